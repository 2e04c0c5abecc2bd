// Runs one loop on the memory of a recorded call. Reads the memory from a file, and writes it back after the call.
using T = float;
#include "call.h"
#include "products.h"
#include "threads.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" Products* products(RunParallel run, ScratchMemory scratch);
extern "C" bool thread_pool_run(int max_threads, bool (*prepare)(void*, int), void (*run)(void*, int, int),
                                void* argument);
extern "C" char* thread_pool_scratch(size_t bytes);
extern "C" bool run(const CallArguments* arguments, void* const* pointers);

static std::vector<int64_t> read_numbers(std::FILE* file) {
  int64_t count = 0;
  if (std::fread(&count, 8, 1, file) != 1) std::abort();
  std::vector<int64_t> numbers(count);
  if (count && std::fread(numbers.data(), 8, count, file) != (size_t)count) std::abort();
  return numbers;
}

int main(int, char** paths) {
  std::FILE* const file = std::fopen(paths[1], "rb");
  const std::vector<int64_t> numbers = read_numbers(file), sizes = read_numbers(file);
  const std::vector<int64_t> places = read_numbers(file), bytes = read_numbers(file);
  std::vector<char*> blocks;
  for (const int64_t size : bytes) {
    blocks.push_back((char*)aligned_memory(64, (size + 63) / 64 * 64 + 64));
    if (std::fread(blocks.back(), 1, size, file) != (size_t)size) std::abort();
  }
  std::fclose(file);
  std::vector<void*> pointers;  // for each the number of its block and the offset in it; -1: null
  for (size_t k = 0; k < places.size(); k += 2)
    pointers.push_back(places[k] < 0 ? nullptr : blocks[places[k]] + places[k + 1]);
  CallArguments arguments;
  std::memcpy(&arguments, numbers.data(), sizeof arguments);  // all fields have eight bytes
  arguments.sizes = sizes.data(), arguments.products = products(thread_pool_run, thread_pool_scratch);
  if (!run(&arguments, pointers.data())) return 1;
  std::FILE* const after = std::fopen(paths[2], "wb");
  for (size_t k = 0; k < blocks.size(); k++) std::fwrite(blocks[k], 1, bytes[k], after);
  return std::fclose(after);
}
