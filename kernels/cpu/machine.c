#include "kernels/cpu/machine.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>

// Reads the first line of a small file, without its newline. Returns whether there was one.
static bool read_line(const char *path, char *line, size_t size)
{
    FILE *file = fopen(path, "re");
    if (!file) return false;
    bool ok = fgets(line, (int)size, file) != NULL;
    fclose(file);
    if (ok) line[strcspn(line, "\n")] = '\0';
    return ok;
}

// Calls visit with the first line of `name` in this process's cgroup (version 2) and in each of its parents. In a
// container that sees its own cgroup as the root, that is /sys/fs/cgroup itself.
static void visit_cgroups(const char *name, void (*visit)(const char *line, void *arg), void *arg)
{
    char own[PATH_MAX], path[2 * PATH_MAX], line[128];
    if (!read_line("/proc/self/cgroup", own, sizeof own) || strncmp(own, "0::/", 4)) strcpy(own, "0::/");
    char *group = own + 3;
    for (;;) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/%s", group, name);
        if (read_line(path, line, sizeof line)) visit(line, arg);
        char *slash = strrchr(group, '/');
        if (!slash || group[1] == '\0') return;
        slash[slash == group] = '\0'; // up one level; keep the root's own slash
    }
}

static void limit_cores(const char *line, void *arg)
{
    long long quota, period;
    int32_t *cores = arg;
    if (sscanf(line, "%lld %lld", &quota, &period) != 2 || quota <= 0 || period <= 0) return; // "max 100000": no limit
    long long allowed = (quota + period - 1) / period;
    if (allowed < *cores) *cores = (int32_t)allowed;
}

static void limit_memory(const char *line, void *arg)
{
    size_t *bytes = arg;
    char *end;
    unsigned long long limit = strtoull(line, &end, 10);
    if (end != line && limit < *bytes) *bytes = (size_t)limit; // "max": no limit
}

int32_t machine_cores(void)
{
    cpu_set_t set;
    int32_t cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    visit_cgroups("cpu.max", limit_cores, &cores);
    return cores;
}

size_t machine_memory(void)
{
    struct sysinfo info;
    size_t bytes = sysinfo(&info) == 0 ? (size_t)info.totalram * info.mem_unit : 0;
    visit_cgroups("memory.max", limit_memory, &bytes);
    return bytes;
}

#ifdef __x86_64__
#include <cpuid.h>

enum isa machine_isa(void)
{
    __builtin_cpu_init(); // also asks the kernel (XCR0) whether it saves the wide registers
    // Every CPU with AVX2 and FMA has F16C, which clang's builtin does not know by name.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ISA_GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? ISA_AVX512BF16 : ISA_AVX512;
}

void machine_cpu_name(char *name, size_t size)
{
    unsigned words[12] = {0};
    for (unsigned i = 0; i < 3; i++)
        __get_cpuid(0x80000002 + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]);
    const char *brand = (const char *)words;
    size_t length = strnlen(brand, sizeof words);
    while (length && brand[length - 1] == ' ') length--;
    while (length && *brand == ' ') brand++, length--;
    snprintf(name, size, "%.*s", (int)length, length ? brand : "");
    if (!length) snprintf(name, size, "x86-64");
}
#else
enum isa machine_isa(void)
{
    return ISA_GENERIC;
}

void machine_cpu_name(char *name, size_t size)
{
    snprintf(name, size, "CPU");
}
#endif
