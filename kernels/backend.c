/* backend.c: finds a backend by name. The CUDA backend is a library of its own, so that a program without a GPU needs
 * none of CUDA. */
#include <dlfcn.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

static const char LIBRARY[] = "libgptd_cuda.so";

// Where the library is: beside the program, or where the system looks for libraries.
static void library_path(char path[PATH_MAX])
{
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - sizeof LIBRARY);
    char *slash = n > 0 ? memrchr(path, '/', (size_t)n) : NULL;
    strcpy(slash ? slash + 1 : path, LIBRARY);
    if (slash && access(path, R_OK) != 0) strcpy(path, LIBRARY);
}

// Why the library does not load, in the loader's words. What most often lacks is not ours.
static int refuse_library(struct error *e)
{
    const char *why = dlerror();
    bool cublas = strstr(why, "libcublasLt");
    return error_set(e, ERR_DEVICE, "the CUDA backend cannot be loaded: %s%s", why,
                     cublas ? ": it comes with the CUDA toolkit, or with pip as nvidia-cublas; put it beside "
                              "libgptd_cuda.so or its directory into LD_LIBRARY_PATH" : "");
}

// The library stays loaded: its table's functions are called until the process ends.
static int open_cuda(const struct kernels **out, struct error *e)
{
    char path[PATH_MAX];
    library_path(path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return refuse_library(e);
    int (*probe)(struct error *) = (int (*)(struct error *))dlsym(library, "gptd_cuda_probe");
    const struct kernels *(*table)(void) = (const struct kernels *(*)(void))dlsym(library, "gptd_kernels_cuda");
    if (!probe || !table) return error_set(e, ERR_DEVICE, "%s is not gptd's CUDA backend", path);
    int rc = probe(e);
    if (rc == 0) *out = table();
    return rc;
}

int kernels_open(const struct kernels **out, const char *backend, struct error *e)
{
    bool is_auto = strcmp(backend, "auto") == 0;
    struct error unwanted;
    e = e ? e : &unwanted;
    *out = NULL;
    *e = (struct error){0};
    if (strcmp(backend, "cuda") == 0) return open_cuda(out, e);
    if (!is_auto && strcmp(backend, "cpu"))
        return error_set(e, ERR_UNSUPPORTED, "backend \"%.32s\" is none of \"auto\", \"cpu\", \"cuda\"", backend);
    // Without the driver's device file there is no GPU to look for, and nothing to load.
    if (is_auto && access("/dev/nvidiactl", F_OK) == 0) {
        if (open_cuda(out, e) == 0) return 0;
        error_prefix(e, "on the CPU, for the GPU cannot be used");
        e->code = 0;
    }
    *out = kernels_cpu();
    return 0;
}
