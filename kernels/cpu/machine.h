/* machine.h: what the machine under this process offers: cores, memory, instruction sets.
 *
 * Used by device_create and the thread pool. Limits of containers (CPU affinity, cgroup quotas) count as the machine's.
 */
#ifndef GPTD_KERNELS_CPU_MACHINE_H
#define GPTD_KERNELS_CPU_MACHINE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/cpu.h"

int32_t machine_cores(void);  // that this process may use: affinity, and the cgroup's CPU quota rounded up
size_t machine_memory(void);  // bytes: the smallest of physical memory and the cgroups' limits
enum isa machine_isa(void);   // the best that CPU and kernel support
void machine_cpu_name(char *name, size_t size); // as the CPU calls itself: "AMD EPYC 9654 96-Core Processor"

#endif
