/* A CUDA driver that is none: what kvd calls of libcuda and libcufile, over shared memory and threads, so that `CudaDevice` runs where no GPU is.
 *
 * Owns what the driver's documentation (cuda.h of CUDA 13.0) says of each function, as far as kvd may rely on it, and is strict about the rest: a call without a current context, a copy that does
 * not lie within one allocation, a range registered twice, an event recorded while somebody waits for it are refused. Streams are threads; nothing happens before it is its turn.
 * The kernels are kvd.cu's own, as C; `../gpu_driver.rs` puts that file in front of this one, and FAKE_VERSION says which driver this is. It answers for
 * logic, never for speed, and never for what a real driver does beside its documentation. With FAKE_CUDA_H the compiler compares these functions with cuda.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef FAKE_CUDA_H
#include <cuda.h>
#else
typedef unsigned CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef unsigned CUdevice_attribute, CUfunction_attribute, CUjit_option, CUpointer_attribute;
typedef unsigned CUmemAllocationHandleType, CUmemAllocationGranularity_flags;
typedef unsigned long long CUmemGenericAllocationHandle;
typedef struct { unsigned type; int id; } CUmemLocation;
typedef struct { CUmemLocation location; unsigned flags; } CUmemAccessDesc;
typedef struct { unsigned type, requestedHandleTypes; CUmemLocation location; void *win32HandleMetaData; unsigned char allocFlags[8]; } CUmemAllocationProp;
typedef struct { unsigned srcAccessOrder; CUmemLocation srcLocHint, dstLocHint; unsigned flags; } CUmemcpyAttributes;
#endif

#define SUCCESS 0
#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define NOT_INITIALIZED 3
#define INVALID_DEVICE 101
#define INVALID_CONTEXT 201
#define NOT_FOUND 500
#define NOT_READY 600
#define ALREADY_REGISTERED 712
#define NOT_REGISTERED 713
#define MEMORY_BYTES (1ull << 30)
#define REGIONS_MAX 256
#define CHUNKS_MAX 4096
#define CHUNK_BYTES (2ull << 20)

/* Allocated, opened or pinned memory, or addresses for chunks. */
typedef struct {
    u64 start, bytes, host;
    char name[64];
    unsigned users;
    enum { FREE, ALLOCATED, OPENED, PINNED, RESERVED } kind;
} Region;

/* A chunk's handle (bytes 0: none), and a chunk that is mapped within reserved addresses. */
typedef struct { u64 bytes; int fd, device; unsigned kind; } Import;
typedef struct { u64 start, bytes; int access; } Mapped;

typedef struct Op {
    struct Op *next;
    enum { COPY, SET, RUN, AWAIT, RECORD } kind;
    u64 to, from, bytes;
    u32 value, width, blocks;
    CUfunction function;
    CUstream awaited;
    u64 awaited_op;
    unsigned char argument[256];
} Op;

struct CUctx_st { int retained; };
struct CUmod_st { int loaded; };
struct CUfunc_st { const char *name; u64 argument_bytes; };
struct CUstream_st { pthread_t thread; Op *first, *last; u64 given, done; int ending, life; };
struct CUevent_st { CUstream stream; u64 op; int waited_for; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct CUctx_st context;
static struct CUmod_st module;
static struct CUfunc_st functions[] = {
    {"kvd_gather", sizeof(struct Cells)}, {"kvd_scatter", sizeof(struct Cells)}, {"kvd_checksum", sizeof(struct Checksums)}};
static __thread CUcontext current;
static Region regions[REGIONS_MAX];
static Import imports[CHUNKS_MAX];
static Mapped mapped_chunks[CHUNKS_MAX];
static int begun, streams, events, held, refusals;
static int life; /* of the context; a stream of an earlier one does nothing any more */
static u64 allocated, calls, batches;
static unsigned sticky, refuse_code;
static char refuse_name[64];

/* ---- For the test -------------------------------------------------------------------------------------------------------------------------------------- */

/* The next `times` calls of `name` are refused with `code`. */
void fake_refuse(const char *name, unsigned code, int times) {
    pthread_mutex_lock(&lock);
    snprintf(refuse_name, sizeof refuse_name, "%s", name);
    refuse_code = code;
    refusals = times;
    pthread_mutex_unlock(&lock);
}

/* The context has failed: work is dropped, and everything answers `code`. */
void fake_fail(unsigned code) {
    pthread_mutex_lock(&lock);
    sticky = code;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Streams do nothing while held. */
void fake_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* 0 calls of copies, 1 of them batched, 2 streams, 3 events, 4 regions, 5 retentions, 6 modules, 7 handles of chunks, 8 chunks mapped. */
u64 fake_count(int which) {
    pthread_mutex_lock(&lock);
    u64 used = 0;
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        used += regions[at].kind != FREE;
    }
    u64 handles = 0, mapped = 0;
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        handles += imports[at].bytes != 0;
        mapped += mapped_chunks[at].bytes != 0;
    }
    const u64 counts[] = {calls, batches, (u64)streams, (u64)events, used, (u64)context.retained, (u64)module.loaded, handles, mapped};
    pthread_mutex_unlock(&lock);
    return counts[which];
}

/* A chunk as another process exports it: memory of that kind (1: it stays where it is) on a device. */
int fake_chunk(u64 bytes, int device, unsigned kind) {
    char name[64];
    snprintf(name, sizeof name, "kvd-fake-chunk-%d-%u", device, kind);
    const int fd = memfd_create(name, MFD_CLOEXEC);
    return fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 ? fd : -1;
}

/* ---- Rules --------------------------------------------------------------------------------------------------------------------------------------------- */

/* What a call answers before it does anything; `lock` is held from here to `leave`. */
static unsigned enter(const char *name, int wants_context) {
    pthread_mutex_lock(&lock);
    if (!begun) {
        return NOT_INITIALIZED;
    }
    if (refusals > 0 && strcmp(name, refuse_name) == 0) {
        refusals -= 1;
        return refuse_code;
    }
    if (!wants_context) {
        return SUCCESS;
    }
    if (current != &context || context.retained == 0) {
        return INVALID_CONTEXT;
    }
    return sticky;
}

static CUresult leave(unsigned code) {
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return (CUresult)code;
}

#define ENTER(name, wants_context)                                                                                                                            \
    do {                                                                                                                                                      \
        unsigned refused = enter(name, wants_context);                                                                                                        \
        if (refused != SUCCESS) {                                                                                                                             \
            return leave(refused);                                                                                                                            \
        }                                                                                                                                                     \
    } while (0)

static Region *free_region(void) {
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        if (regions[at].kind == FREE) {
            return &regions[at];
        }
    }
    return NULL;
}

static Region *containing(u64 address, u64 bytes) {
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        Region *region = &regions[at];
        if (region->kind != FREE && address >= region->start && bytes <= region->bytes && address - region->start <= region->bytes - bytes) {
            return region;
        }
    }
    return NULL;
}

/* Bytes of a range that are chunks' (which never overlap); those that may not be touched do not count where access is wanted. */
static u64 mapped_bytes(u64 address, u64 bytes, int access) {
    u64 sum = 0;
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        const Mapped *chunk = &mapped_chunks[at];
        const u64 first = chunk->start > address ? chunk->start : address;
        const u64 chunk_end = chunk->start + chunk->bytes, end = chunk_end < address + bytes ? chunk_end : address + bytes;
        sum += first < end && (chunk->access || !access) ? end - first : 0;
    }
    return sum;
}

/* Memory that may be touched. */
static Region *around(u64 address, u64 bytes) {
    Region *region = containing(address, bytes);
    return region == NULL || (region->kind == RESERVED && mapped_bytes(address, bytes, 1) != bytes) ? NULL : region;
}

static Region *beginning(u64 address, int kind) {
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        if ((int)regions[at].kind == kind && regions[at].start == address) {
            return &regions[at];
        }
    }
    return NULL;
}

static void drop_region(Region *region) {
    munmap((void *)region->start, region->bytes);
    memset(region, 0, sizeof *region);
}

/* ---- Streams ------------------------------------------------------------------------------------------------------------------------------------------- */

static void run(const Op *op) {
    const u32 threads = op->blocks * KVD_CELLS_THREADS;
    if (op->kind == COPY) {
        memcpy((void *)op->to, (const void *)op->from, op->bytes);
    } else if (op->kind == SET) {
        for (u64 at = 0; at < op->bytes; at += 1) {
            if (op->width == 4) {
                ((u32 *)op->to)[at] = op->value;
            } else {
                ((u8 *)op->to)[at] = (u8)op->value;
            }
        }
    } else if (op->kind == RUN && op->function == &functions[2]) {
        struct Scratch scratch;
        for (u32 at = 0; at < op->blocks; at += 1) {
            kvd_checksum_block((const struct Checksums *)op->argument, at, op->blocks, &scratch);
        }
    } else if (op->kind == RUN) {
        for (u32 at = 0; at < threads; at += 1) {
            kvd_cells_by_unit((const struct Cells *)op->argument, at, threads, op->function == &functions[0]);
        }
    }
}

static void *work(void *argument) {
    CUstream stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        Op *op = stream->first;
        if (op == NULL && stream->ending) {
            break;
        }
        const int dead = sticky || stream->life != life;
        const int blocked = op == NULL || (!dead && (held || (op->kind == AWAIT && op->awaited->done < op->awaited_op)));
        if (blocked) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        if (!dead) {
            pthread_mutex_unlock(&lock);
            run(op);
            pthread_mutex_lock(&lock);
        }
        stream->first = op->next;
        stream->done += 1;
        free(op);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static Op *give(CUstream stream, int kind) {
    Op *op = calloc(1, sizeof *op);
    op->kind = kind;
    if (stream->first == NULL) {
        stream->first = op;
    } else {
        stream->last->next = op;
    }
    stream->last = op;
    stream->given += 1;
    return op;
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    ENTER("cuStreamCreateWithPriority", 1);
    if (flags != 1 || priority != 0) {
        return leave(INVALID_VALUE);
    }
    *stream = calloc(1, sizeof **stream);
    (*stream)->life = life;
    pthread_create(&(*stream)->thread, NULL, work, *stream);
    streams += 1;
    return leave(SUCCESS);
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER("cuStreamDestroy_v2", 1);
    stream->ending = 1;
    streams -= 1;
    leave(SUCCESS);
    pthread_join(stream->thread, NULL);
    free(stream);
    return SUCCESS;
}

CUresult cuStreamQuery(CUstream stream) {
    ENTER("cuStreamQuery", 1);
    return leave(stream->done < stream->given ? NOT_READY : SUCCESS);
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    ENTER("cuStreamWaitEvent", 1);
    if (flags != 0) {
        return leave(INVALID_VALUE);
    }
    if (event->stream != NULL) {
        Op *op = give(stream, AWAIT);
        op->awaited = event->stream;
        op->awaited_op = event->op;
    }
    return leave(SUCCESS);
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    ENTER("cuEventCreate", 1);
    if (flags != 3) { /* blocking, without timing */
        return leave(INVALID_VALUE);
    }
    *event = calloc(1, sizeof **event);
    events += 1;
    return leave(SUCCESS);
}

CUresult cuEventDestroy_v2(CUevent event) {
    ENTER("cuEventDestroy_v2", 1);
    if (event->waited_for) {
        return leave(INVALID_VALUE);
    }
    events -= 1;
    free(event);
    return leave(SUCCESS);
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER("cuEventRecord", 1);
    if (event->waited_for) {
        abort();
    }
    give(stream, RECORD);
    event->stream = stream;
    event->op = stream->given;
    return leave(SUCCESS);
}

CUresult cuEventQuery(CUevent event) {
    ENTER("cuEventQuery", 1);
    return leave(event->stream != NULL && event->stream->done < event->op ? NOT_READY : SUCCESS);
}

CUresult cuEventSynchronize(CUevent event) {
    ENTER("cuEventSynchronize", 1);
    event->waited_for += 1;
    while (!sticky && event->stream != NULL && event->stream->done < event->op) {
        pthread_cond_wait(&changed, &lock);
    }
    event->waited_for -= 1;
    return leave(sticky);
}

/* ---- Work ---------------------------------------------------------------------------------------------------------------------------------------------- */

static unsigned copy(u64 to, u64 from, u64 bytes, CUstream stream) {
    if (bytes == 0 || stream == NULL || around(to, bytes) == NULL || around(from, bytes) == NULL) {
        return INVALID_VALUE;
    }
    Op *op = give(stream, COPY);
    op->to = to;
    op->from = from;
    op->bytes = bytes;
    return SUCCESS;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyAsync", 1);
    calls += 1;
    return leave(copy(to, from, bytes, stream));
}

#if FAKE_VERSION >= 12080
static unsigned batch(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count, CUmemcpyAttributes *attributes, size_t *first, size_t sets, CUstream stream) {
    calls += 1;
    batches += 1;
    if (count == 0 || sets != 1 || first[0] != 0 || attributes->srcAccessOrder != 1 || attributes->flags > 1) {
        return INVALID_VALUE;
    }
    for (size_t at = 0; at < count; at += 1) {
        unsigned code = copy(to[at], from[at], bytes[at], stream);
        if (code != SUCCESS) {
            return code;
        }
    }
    /* Read by now: a caller that still changes them changes nothing. */
    memset(to, 0xee, count * sizeof *to);
    memset(from, 0xee, count * sizeof *from);
    memset(bytes, 0xee, count * sizeof *bytes);
    return SUCCESS;
}

#ifdef FAKE_CUDA_H
#undef cuMemcpyBatchAsync
#endif
CUresult cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count, CUmemcpyAttributes *attributes, size_t *first, size_t sets, size_t *failed,
                            CUstream stream) {
    ENTER("cuMemcpyBatchAsync", 1);
    *failed = 0;
    return leave(batch(to, from, bytes, count, attributes, first, sets, stream));
}
#endif

#if FAKE_VERSION >= 13000
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count, CUmemcpyAttributes *attributes, size_t *first, size_t sets, CUstream stream) {
    ENTER("cuMemcpyBatchAsync_v2", 1);
    return leave(batch(to, from, bytes, count, attributes, first, sets, stream));
}
#endif

static unsigned set(u64 to, u32 value, u32 width, u64 count, CUstream stream) {
    if (to % width != 0 || around(to, count * width) == NULL) {
        return INVALID_VALUE;
    }
    Op *op = give(stream, SET);
    op->to = to;
    op->value = value;
    op->width = width;
    op->bytes = count;
    return SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    ENTER("cuMemsetD8Async", 1);
    return leave(set(to, value, 1, count, stream));
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    ENTER("cuMemsetD32Async", 1);
    return leave(set(to, value, 4, count, stream));
}

CUresult cuModuleLoadDataEx(CUmodule *loaded, const void *image, unsigned count, CUjit_option *options, void **values) {
    ENTER("cuModuleLoadDataEx", 1);
    if (count != 2 || options[0] != 5 || options[1] != 6) {
        return leave(INVALID_VALUE);
    }
    if (strstr(image, ".version 8.0") == NULL) {
        snprintf(values[0], (size_t)values[1], "a version that this does not know");
        return leave(222);
    }
    module.loaded += 1;
    *loaded = &module;
    return leave(SUCCESS);
}

CUresult cuModuleUnload(CUmodule unloaded) {
    ENTER("cuModuleUnload", 1);
    unloaded->loaded -= 1;
    return leave(SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule from, const char *name) {
    ENTER("cuModuleGetFunction", 1);
    for (size_t at = 0; at < sizeof functions / sizeof *functions && from == &module; at += 1) {
        if (strcmp(functions[at].name, name) == 0) {
            *function = &functions[at];
            return leave(SUCCESS);
        }
    }
    return leave(NOT_FOUND);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    ENTER("cuFuncGetAttribute", 1);
    *value = 0;
    return leave(attribute == 3 && function != NULL ? SUCCESS : INVALID_VALUE);
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared, CUstream stream, void **arguments,
                        void **extra) {
    ENTER("cuLaunchKernel", 1);
    const unsigned wanted = function == &functions[2] ? KVD_CHECKSUM_THREADS : KVD_CELLS_THREADS;
    if (x == 0 || y != 1 || z != 1 || threads != wanted || ty != 1 || tz != 1 || shared != 0 || extra != NULL) {
        return leave(INVALID_VALUE);
    }
    Op *op = give(stream, RUN);
    op->function = function;
    op->blocks = x;
    memcpy(op->argument, arguments[0], function->argument_bytes);
    return leave(SUCCESS);
}

/* ---- Driver, device, context --------------------------------------------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    begun = flags == 0;
    return leave(flags == 0 ? SUCCESS : INVALID_VALUE);
}

CUresult cuDriverGetVersion(int *version) {
    *version = FAKE_VERSION;
    return SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char **name) {
    *name = code < 1000 ? "FAKE_ERROR" : NULL;
    return code < 1000 ? SUCCESS : INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code < 1000 ? "as the test wished" : NULL;
    return code < 1000 ? SUCCESS : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount", 0);
    *count = 1;
    return leave(SUCCESS);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER("cuDeviceGet", 0);
    *device = 0;
    return leave(ordinal == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
    ENTER("cuDeviceGetName", 0);
    snprintf(name, (size_t)bytes, "Fake GPU");
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDeviceGetPCIBusId(char *name, int bytes, CUdevice device) {
    ENTER("cuDeviceGetPCIBusId", 0);
    snprintf(name, (size_t)bytes, "0000:17:00.0");
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTER("cuDeviceGetUuid_v2", 0);
    memcpy(uuid->bytes, "a fake GPU's id.", 16);
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER("cuDeviceTotalMem_v2", 0);
    *bytes = MEMORY_BYTES;
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER("cuDeviceGetAttribute", 0);
    switch (attribute) {
    case 16: *value = 2; break;  /* multiprocessors */
    case 41: *value = 1; break;  /* unified addresses */
    case 75: *value = 9; break;  /* compute capability, major */
    case 76: *value = 0; break;  /* and minor */
    case 103: *value = 1; break; /* memory by descriptor */
    case 124: *value = 1; break; /* dma-buf */
    default: return leave(INVALID_VALUE);
    }
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    ENTER("cuDevicePrimaryCtxSetFlags_v2", 0);
    return leave(device == 0 && flags == 4 ? SUCCESS : INVALID_VALUE);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    ENTER("cuDevicePrimaryCtxRetain", 0);
    context.retained += 1;
    *retained = &context;
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

/* The last release ends the context, its errors, and all that is in it. */
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER("cuDevicePrimaryCtxRelease_v2", 0);
    context.retained -= 1;
    if (context.retained == 0 && sticky) {
        sticky = 0;
        life += 1;
        streams = events = module.loaded = 0;
        for (int at = 0; at < REGIONS_MAX; at += 1) {
            if (regions[at].kind == ALLOCATED) {
                shm_unlink(regions[at].name);
            }
            if (regions[at].kind != FREE && regions[at].kind != RESERVED) { /* chunks are the process's */
                drop_region(&regions[at]);
            }
        }
        allocated = 0;
    }
    return leave(device == 0 ? SUCCESS : INVALID_DEVICE);
}

CUresult cuCtxGetCurrent(CUcontext *found) {
    *found = current;
    return SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext set) {
    current = set;
    return SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER("cuCtxGetStreamPriorityRange", 1);
    *least = 0;
    *greatest = -5;
    return leave(SUCCESS);
}

/* ---- Memory -------------------------------------------------------------------------------------------------------------------------------------------- */

CUresult cuMemGetInfo_v2(size_t *unused, size_t *total) {
    ENTER("cuMemGetInfo_v2", 1);
    *unused = MEMORY_BYTES - allocated;
    *total = MEMORY_BYTES;
    return leave(SUCCESS);
}

/* Maps shared memory by name; the size of an existing one where `bytes` is 0. */
static void *map_named(const char *name, u64 *bytes) {
    const int fd = shm_open(name, *bytes ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
    if (fd < 0) {
        return NULL;
    }
    if (*bytes == 0) {
        *bytes = (u64)lseek(fd, 0, SEEK_END);
    } else if (ftruncate(fd, (off_t)*bytes) != 0) {
        abort();
    }
    void *mapped = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return mapped == MAP_FAILED ? NULL : mapped;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    static unsigned made;
    ENTER("cuMemAlloc_v2", 1);
    Region *region = free_region();
    if (region == NULL || bytes == 0 || bytes > MEMORY_BYTES - allocated) {
        return leave(OUT_OF_MEMORY);
    }
    u64 size = bytes;
    made += 1;
    snprintf(region->name, sizeof region->name, "/kvd-fake-%d-%u", (int)getpid(), made);
    void *mapped = map_named(region->name, &size);
    if (mapped == NULL) {
        return leave(OUT_OF_MEMORY);
    }
    region->start = (u64)mapped;
    region->bytes = bytes;
    region->kind = ALLOCATED;
    allocated += bytes;
    *address = region->start;
    return leave(SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER("cuMemFree_v2", 1);
    Region *region = beginning(address, ALLOCATED);
    if (region == NULL) {
        return leave(INVALID_VALUE);
    }
    allocated -= region->bytes;
    shm_unlink(region->name);
    drop_region(region);
    return leave(SUCCESS);
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER("cuMemGetAddressRange_v2", 1);
    const Region *region = around(address, 1);
    if (region == NULL) {
        return leave(NOT_FOUND);
    }
    *base = region->start;
    *bytes = region->bytes;
    return leave(SUCCESS);
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER("cuPointerGetAttribute", 1);
    *(int *)value = 0;
    return leave(attribute == 9 && around(address, 1) != NULL ? SUCCESS : INVALID_VALUE);
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    ENTER("cuIpcGetMemHandle", 1);
    const Region *region = beginning(address, ALLOCATED);
    if (region == NULL) {
        return leave(INVALID_VALUE);
    }
    memcpy(handle->reserved, region->name, sizeof handle->reserved);
    return leave(SUCCESS);
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags) {
    char own[32];
    ENTER("cuIpcOpenMemHandle_v2", 1);
    snprintf(own, sizeof own, "/kvd-fake-%d-", (int)getpid());
    if (flags != 1 || strncmp(handle.reserved, "/kvd-fake-", 10) != 0 || memchr(handle.reserved, 0, 64) == NULL) {
        return leave(INVALID_VALUE);
    }
    if (strncmp(handle.reserved, own, strlen(own)) == 0) {
        return leave(INVALID_CONTEXT);
    }
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        if (regions[at].kind == OPENED && strcmp(regions[at].name, handle.reserved) == 0) {
            regions[at].users += 1;
            *address = regions[at].start;
            return leave(SUCCESS);
        }
    }
    Region *region = free_region();
    void *mapped = region == NULL ? NULL : map_named(handle.reserved, &region->bytes);
    if (mapped == NULL) {
        return leave(205);
    }
    memcpy(region->name, handle.reserved, sizeof region->name);
    region->start = (u64)mapped;
    region->users = 1;
    region->kind = OPENED;
    *address = region->start;
    return leave(SUCCESS);
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    ENTER("cuIpcCloseMemHandle", 1);
    Region *region = beginning(address, OPENED);
    if (region == NULL) {
        return leave(INVALID_VALUE);
    }
    region->users -= 1;
    if (region->users == 0) {
        drop_region(region);
    }
    return leave(SUCCESS);
}

/* The device sees pinned memory elsewhere, so that whoever takes one address for the other is found out: shared pages are mapped once more, others stay where they are. */
CUresult cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned flags) {
    ENTER("cuMemHostRegister_v2", 1);
    if (flags != 3) {
        return leave(INVALID_VALUE);
    }
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        if (regions[at].kind == PINNED && regions[at].host < (u64)pointer + bytes && (u64)pointer < regions[at].host + regions[at].bytes) {
            return leave(ALREADY_REGISTERED);
        }
    }
    Region *region = free_region();
    void *again = mremap(pointer, 0, bytes, MREMAP_MAYMOVE);
    if (region == NULL || again == MAP_FAILED) {
        return leave(OUT_OF_MEMORY);
    }
    region->host = (u64)pointer;
    region->start = (u64)again;
    region->bytes = bytes;
    region->kind = PINNED;
    return leave(SUCCESS);
}

static Region *pinned(const void *pointer) {
    for (int at = 0; at < REGIONS_MAX; at += 1) {
        if (regions[at].kind == PINNED && regions[at].host == (u64)pointer) {
            return &regions[at];
        }
    }
    return NULL;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *pointer, unsigned flags) {
    ENTER("cuMemHostGetDevicePointer_v2", 1);
    const Region *region = pinned(pointer);
    if (region == NULL || flags != 0) {
        return leave(INVALID_VALUE);
    }
    *address = region->start;
    return leave(SUCCESS);
}

CUresult cuMemHostUnregister(void *pointer) {
    ENTER("cuMemHostUnregister", 1);
    Region *region = pinned(pointer);
    if (region == NULL) {
        return leave(NOT_REGISTERED);
    }
    drop_region(region);
    return leave(SUCCESS);
}

/* ---- Virtual memory ------------------------------------------------------------------------------------------------------------------------------------ */

#if FAKE_VERSION >= 12040 /* an earlier fake is a driver without them */
CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *wanted, CUmemAllocationGranularity_flags which) {
    ENTER("cuMemGetAllocationGranularity", 1);
    *bytes = CHUNK_BYTES;
    return leave(wanted->type == 1 && wanted->requestedHandleTypes == 1 && wanted->location.type == 1 && wanted->location.id == 0 && which == 0 ? SUCCESS : INVALID_VALUE);
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
    ENTER("cuMemAddressReserve", 1);
    Region *region = free_region();
    if (region == NULL || bytes == 0 || bytes % CHUNK_BYTES != 0 || alignment != 0 || wish != 0 || flags != 0) {
        return leave(INVALID_VALUE);
    }
    const u64 all = bytes + CHUNK_BYTES, found = (u64)mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    const u64 start = (found + CHUNK_BYTES - 1) / CHUNK_BYTES * CHUNK_BYTES;
    if (start > found) {
        munmap((void *)found, start - found);
    }
    if (found + all > start + bytes) {
        munmap((void *)(start + bytes), found + all - start - bytes);
    }
    region->start = start;
    region->bytes = bytes;
    region->kind = RESERVED;
    *address = start;
    return leave(SUCCESS);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    ENTER("cuMemAddressFree", 1);
    Region *region = beginning(address, RESERVED);
    if (region == NULL || region->bytes != bytes || mapped_bytes(address, bytes, 0) != 0) {
        return leave(INVALID_VALUE);
    }
    drop_region(region);
    return leave(SUCCESS);
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *descriptor, CUmemAllocationHandleType type) {
    char path[64], name[128] = "";
    int device = 0;
    unsigned kind = 0;
    ENTER("cuMemImportFromShareableHandle", 1);
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(u64)descriptor);
    if (type != 1 || readlink(path, name, sizeof name - 1) < 0 || sscanf(name, "/memfd:kvd-fake-chunk-%d-%u", &device, &kind) != 2) {
        return leave(INVALID_VALUE);
    }
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        if (imports[at].bytes == 0) {
            const int fd = dup((int)(u64)descriptor);
            imports[at] = (Import){(u64)lseek(fd, 0, SEEK_END), fd, device, kind};
            *handle = (CUmemGenericAllocationHandle)at + 1;
            return leave(SUCCESS);
        }
    }
    return leave(OUT_OF_MEMORY);
}

static Import *imported(CUmemGenericAllocationHandle handle) {
    return handle > 0 && handle <= CHUNKS_MAX && imports[handle - 1].bytes != 0 ? &imports[handle - 1] : NULL;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *found, CUmemGenericAllocationHandle handle) {
    ENTER("cuMemGetAllocationPropertiesFromHandle", 1);
    const Import *import = imported(handle);
    if (import == NULL) {
        return leave(INVALID_VALUE);
    }
    memset(found, 0, sizeof *found);
    found->type = import->kind;
    found->requestedHandleTypes = 1;
    found->location.type = 1;
    found->location.id = import->device;
    return leave(SUCCESS);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTER("cuMemRelease", 1);
    Import *import = imported(handle);
    if (import == NULL) {
        return leave(INVALID_VALUE);
    }
    close(import->fd);
    memset(import, 0, sizeof *import);
    return leave(SUCCESS);
}

/* Not to be touched before `cuMemSetAccess`. */
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    ENTER("cuMemMap", 1);
    const Import *import = imported(handle);
    const Region *region = containing(address, bytes);
    if (import == NULL || import->bytes != bytes || region == NULL || region->kind != RESERVED || mapped_bytes(address, bytes, 0) != 0 || offset != 0 || flags != 0) {
        return leave(INVALID_VALUE);
    }
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        if (mapped_chunks[at].bytes == 0) {
            if (mmap((void *)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, import->fd, 0) == MAP_FAILED) {
                return leave(OUT_OF_MEMORY);
            }
            mapped_chunks[at] = (Mapped){address, bytes, 0};
            return leave(SUCCESS);
        }
    }
    return leave(OUT_OF_MEMORY);
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count) {
    ENTER("cuMemSetAccess", 1);
    if (mapped_bytes(address, bytes, 0) != bytes || count != 1 || access->location.type != 1 || access->location.id != 0 || access->flags != 3) {
        return leave(INVALID_VALUE);
    }
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        Mapped *chunk = &mapped_chunks[at];
        if (chunk->bytes != 0 && chunk->start >= address && chunk->start < address + bytes) {
            chunk->access = mprotect((void *)chunk->start, chunk->bytes, PROT_READ | PROT_WRITE) == 0;
        }
    }
    return leave(SUCCESS);
}

CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    ENTER("cuMemUnmap", 1);
    for (int at = 0; at < CHUNKS_MAX; at += 1) {
        if (mapped_chunks[at].bytes == bytes && mapped_chunks[at].start == address) {
            mmap((void *)address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
            memset(&mapped_chunks[at], 0, sizeof mapped_chunks[at]);
            return leave(SUCCESS);
        }
    }
    return leave(INVALID_VALUE);
}
#endif

/* ---- cuFile -------------------------------------------------------------------------------------------------------------------------------------------- */

typedef struct { int file; unsigned cuda; } FileStatus;
typedef struct { int type; union { int fd; void *handle; } handle; const void *operations; } FileDescription;

static FileStatus file_status(int code) {
    const FileStatus status = {code, 0};
    return status;
}

FileStatus cuFileDriverOpen(void) {
    static int open;
    const int again = open;
    open = 1;
    return file_status(again ? 5026 : 0);
}

FileStatus cuFileHandleRegister(void **handle, FileDescription *description) {
    const int flags = fcntl(description->handle.fd, F_GETFL);
    if (description->type != 1 || description->operations != NULL || flags < 0) {
        return file_status(5022);
    }
    if (current != &context) {
        return file_status(5015);
    }
    *handle = (void *)(u64)(description->handle.fd + 1);
    return file_status(flags & O_DIRECT ? 0 : 5020);
}

void cuFileHandleDeregister(void *handle) {
    (void)handle;
}

static u64 file_base;

FileStatus cuFileBufRegister(const void *base, size_t bytes, int flags) {
    if (around((u64)base, bytes) == NULL || flags != 0) {
        return file_status(5022);
    }
    file_base = (u64)base;
    return file_status(0);
}

FileStatus cuFileBufDeregister(const void *base) {
    const int known = file_base == (u64)base;
    file_base = 0;
    return file_status(known ? 0 : 5024);
}

/* At most 64 KiB at a time, so that callers must ask again. */
ssize_t cuFileRead(void *handle, void *base, size_t bytes, off_t at, off_t into) {
    if (around((u64)base + (u64)into, bytes) == NULL || (into != 0 && file_base != (u64)base)) {
        return -5014;
    }
    return pread((int)(u64)handle - 1, (char *)base + into, bytes < 65536 ? bytes : 65536, at);
}

ssize_t cuFileWrite(void *handle, const void *base, size_t bytes, off_t at, off_t from) {
    if (around((u64)base + (u64)from, bytes) == NULL || (from != 0 && file_base != (u64)base)) {
        return -5014;
    }
    return pwrite((int)(u64)handle - 1, (const char *)base + from, bytes < 65536 ? bytes : 65536, at);
}
