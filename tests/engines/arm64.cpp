// Runs one loop on the memory of a recorded call: it is read from a file, and written back as the loop left it.
using T = float;
#include "products.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" Products* products(TeamRun team, TeamRoom room);
extern "C" bool team_run(int wanted, bool (*prepare)(void*, int), void (*run)(void*, int, int), void* what);
extern "C" char* team_room(size_t bytes);
extern "C" bool run(const int64_t* sizes, void* const* pointers, const Products* products);

static std::vector<int64_t> numbers(std::FILE* file) {
  int64_t count = 0;
  if (std::fread(&count, 8, 1, file) != 1) std::abort();
  std::vector<int64_t> found(count);
  if (count && std::fread(found.data(), 8, count, file) != (size_t)count) std::abort();
  return found;
}

int main(int, char** paths) {
  std::FILE* const file = std::fopen(paths[1], "rb");
  const std::vector<int64_t> sizes = numbers(file), places = numbers(file), bytes = numbers(file);
  std::vector<char*> blocks;
  for (const int64_t size : bytes) {
    blocks.push_back((char*)std::aligned_alloc(64, (size + 63) / 64 * 64 + 64));
    if (std::fread(blocks.back(), 1, size, file) != (size_t)size) std::abort();
  }
  std::fclose(file);
  std::vector<void*> pointers;  // each a block and bytes behind its beginning; or no block
  for (size_t k = 0; k < places.size(); k += 2)
    pointers.push_back(places[k] < 0 ? nullptr : blocks[places[k]] + places[k + 1]);
  if (!run(sizes.data(), pointers.data(), products(team_run, team_room))) return 1;
  std::FILE* const after = std::fopen(paths[2], "wb");
  for (size_t k = 0; k < blocks.size(); k++) std::fwrite(blocks[k], 1, bytes[k], after);
  return std::fclose(after);
}
