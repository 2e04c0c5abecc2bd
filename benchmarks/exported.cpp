// Times one step of an exported layer and of RTNeural's layer with the same weights, in turn. Prints the difference of
// their outputs from torch's and the median times of a step in microseconds: ours, RTNeural.
#include <RTNeural/RTNeural.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>
#include "layer.h"
#include "m.h"

using Layer = RTNeural::LAYER<float, INPUTS, UNITS>;
using Rows = std::vector<std::vector<float>>;
static RTNeural::ModelT<float, INPUTS, UNITS, Layer> model;
static m_state state;
alignas(64) static float x[16], y[UNITS];
constexpr int ROUNDS = 41, CALLS = 2000;

static Rows rows(const float *from, int count) {
  Rows result;
  for (int k = 0; k < count; k++) result.emplace_back(from + k * GATES * UNITS, from + (k + 1) * GATES * UNITS);
  return result;
}

template <class Step>
static double time(Step step) {
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < CALLS; t++) {
    for (int k = 0; k < INPUTS; k++) x[k] = X[t % STEPS * INPUTS + k];
    step();
  }
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / CALLS;
}

int main() {
  auto &layer = model.template get<0>();
  layer.setWVals(rows(WEIGHT_IH, INPUTS));
  layer.setUVals(rows(WEIGHT_HH, UNITS));
#if GATES == 4
  layer.setBVals(rows(BIAS, 1)[0]);
#else
  layer.setBVals(rows(BIAS, 2));
#endif
  model.reset();
  m_init(&state);
  double ours = 0, theirs = 0;
  for (int t = 0; t < STEPS; t++) {
    for (int k = 0; k < INPUTS; k++) x[k] = X[t * INPUTS + k];
    m_step(&state, x, y);
    model.forward(x);
    for (int k = 0; k < UNITS; k++) {
      ours = std::max(ours, (double)std::abs(y[k] - Y[t * UNITS + k]));
      theirs = std::max(theirs, (double)std::abs(model.getOutputs()[k] - Y[t * UNITS + k]));
    }
  }
  std::vector<double> times[2];
  for (int round = 0; round < ROUNDS; round++) {
    times[0].push_back(time([] { m_step(&state, x, y); }));
    times[1].push_back(time([] { model.forward(x); }));
  }
  for (auto &one : times) std::sort(one.begin(), one.end());
  std::printf("%g %g %g %g\n", ours, theirs, times[0][ROUNDS / 2], times[1][ROUNDS / 2]);
}
