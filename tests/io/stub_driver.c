/* As much of libcuda as kvikio asks for: a device whose memory is the host's, and every address is of it. Loaded before
   all else, it also makes reads fail. For tests. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>

typedef int Result;
typedef unsigned long long Address;
enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, OF_A_DEVICE = 2, PAGE = 4096 };

#define DOES_NOTHING(name) Result name(void) { return 0; }
#define GIVES_A_HANDLE(name) Result name(void **handle) { *handle = (void *)1; return 0; }

DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxPushCurrent_v2)
DOES_NOTHING(cuCtxPopCurrent_v2)
DOES_NOTHING(cuCtxDestroy_v2)
DOES_NOTHING(cuDevicePrimaryCtxRelease_v2)
DOES_NOTHING(cuMemHostUnregister)
DOES_NOTHING(cuStreamSynchronize)
DOES_NOTHING(cuStreamDestroy_v2)
DOES_NOTHING(cuEventSynchronize)
DOES_NOTHING(cuEventDestroy_v2)
DOES_NOTHING(cuEventRecord)
DOES_NOTHING(cuEventQuery)
DOES_NOTHING(cuLaunchHostFunc)
GIVES_A_HANDLE(cuCtxCreate_v2)
GIVES_A_HANDLE(cuCtxGetCurrent)
GIVES_A_HANDLE(cuDevicePrimaryCtxRetain)
GIVES_A_HANDLE(cuStreamCreate)
GIVES_A_HANDLE(cuEventCreate)

static Result number(int *into, int value) { *into = value; return 0; }
Result cuDriverGetVersion(int *version) { return number(version, 12040); }
Result cuCtxGetDevice(int *device) { return number(device, 0); }
Result cuDeviceGet(int *device, int ordinal) { return number(device, ordinal); }
Result cuDeviceGetCount(int *count) { return number(count, 1); }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { return number(value, 0); }

static Result text(const char **into) { *into = "the stub failed"; return 0; }
Result cuGetErrorName(Result error, const char **name) { return text(name); }
Result cuGetErrorString(Result error, const char **string) { return text(string); }

static size_t pinned; /* bytes of the host's memory that were ever pinned */
size_t stub_pinned(void) { return pinned; }
Result cuMemHostRegister_v2(void *memory, size_t size, unsigned flags) {
  __sync_fetch_and_add(&pinned, size);
  return 0;
}
Result cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
  __sync_fetch_and_add(&pinned, size);
  *memory = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
  return *memory == NULL;
}
Result cuMemFreeHost(void *memory) { free(memory); return 0; }

static Result copy(void *to, const void *from, size_t size) { memcpy(to, from, size); return 0; }
Result cuMemcpyAsync(Address to, Address from, size_t size, void *stream) { return copy((void *)to, (void *)from, size); }
Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, void *stream) { return copy((void *)to, from, size); }
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, void *stream) { return copy(to, (void *)from, size); }

Result cuMemGetAddressRange_v2(Address *base, size_t *size, Address address) {
  *base = address;
  *size = (size_t)1 << 40;
  return 0;
}
Result cuPointerGetAttribute(void *value, int attribute, Address address) {
  if (attribute == CONTEXT) *(void **)value = (void *)1;
  else if (attribute == DEVICE_POINTER) *(Address *)value = address;
  else *(int *)value = attribute == MEMORY_TYPE ? OF_A_DEVICE : 0;
  return 0;
}
Result cuPointerGetAttributes(unsigned count, int *attributes, void **values, Address address) {
  for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(values[i], attributes[i], address);
  return 0;
}

/* Reads of that file that start there fail, as those of a bad sector do. */

static ino_t bad_file;
static off_t bad_offset;
void stub_fail_at(unsigned long inode, long offset) { bad_offset = offset; bad_file = inode; }

ssize_t pread64(int fd, void *into, size_t size, off64_t offset) {
  static ssize_t (*real)(int, void *, size_t, off64_t);
  struct stat file;
  if (bad_file && offset == bad_offset && !fstat(fd, &file) && file.st_ino == bad_file) {
    errno = EIO;
    return -1;
  }
  if (!real) real = dlsym(RTLD_NEXT, "pread64");
  return real(fd, into, size, offset);
}
ssize_t pread(int fd, void *into, size_t size, off_t offset) { return pread64(fd, into, size, offset); }
