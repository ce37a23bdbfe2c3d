// SPDX-License-Identifier: BSD-3-Clause
// The barrier of a team, apart from run.cpp because a library with a cell of its own has one, too.
#include <sched.h>

#include "kernels.h"

namespace fastrnn {
namespace cpu {

void wait(Barrier* barrier, int members) {
  if (members == 1) return;
  const int phase = __atomic_load_n(&barrier->phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == members) {
    __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  // About 20 us of spinning; a member that lost its core is then given ours.
  for (int spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins < 1000) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

}  // namespace cpu
}  // namespace fastrnn
