// SPDX-License-Identifier: BSD-3-Clause
// How a team meets, apart from run.cpp because a library with a cell of its own has one, too.
#include <sched.h>

#include "kernels.h"

namespace fastrnn {
namespace cpu {

// In round r a member waits for the one 2^r before it: all have arrived after log2(members) rounds, of which each takes
// one way of a cache line from core to core. A counter that all of them raise would travel to each in turn.
void wait(const Team& team) {
  if (team.members == 1) return;
  int64_t* const own = &team.signals[team.member].rounds;
  int64_t round = __atomic_load_n(own, __ATOMIC_RELAXED);
  for (int distance = 1; distance < team.members; distance *= 2) {
    __atomic_store_n(own, ++round, __ATOMIC_RELEASE);
    const int other = team.member - distance + (team.member < distance ? team.members : 0);
    // About 6 us of spinning; a member that lost its core is then given ours. Longer is no better, and worse where
    // threads are more than cores.
    for (int spins = 0; __atomic_load_n(&team.signals[other].rounds, __ATOMIC_ACQUIRE) < round; ++spins) {
      if (spins < 300) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }
}

}  // namespace cpu
}  // namespace fastrnn
