// Stands in for torch in a driver without it: one thread.
#pragma once
#include <cstdint>
namespace torch::stable {
inline int64_t get_num_threads() { return 1; }
template <class F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}
}  // namespace torch::stable
