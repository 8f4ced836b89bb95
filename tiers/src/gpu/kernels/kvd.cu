/* kvd's three kernels: pages to slots, slots to pages, CRC-32 of runs.
 *
 * Owns: how the work is cut among threads, and nothing else: what the arguments mean is said in `../work.rs`, field by field (a test compares names and order).
 * Invariants: nothing outside what `work.rs` names is read or written; no barrier stands in a branch; no thread of gather and scatter needs another.
 * The bodies are C: `tests/gpu_kernels.rs` compiles this same file with the system's C compiler and runs every thread in turn, so that the logic is tested on
 * machines without a GPU. What differs stands in the first section only. `build.sh` makes `kvd.ptx` of it, which is what ships.
 * Leaves to others: bounds, the grid's size, what waits for what (`../cuda`).
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

/* ---- Device and host -------------------------------------------------------------------------------------------------------------------------------- */

/* What is moved at once: up to 16 bytes, in as many of the words as that takes. */
typedef struct {
    u32 word[4];
} Unit;

#ifdef __CUDACC__

#define KVD_INLINE static __device__ __forceinline__
#define KVD_CONSTANT static __constant__ const
#define KVD_UNROLL _Pragma("unroll")
/* Runs what follows for each thread of a block, all of them when all have done what stands before. */
#define KVD_EACH_THREAD(thread)                                                                                                                               \
    __syncthreads();                                                                                                                                          \
    for (u32 thread = threadIdx.x, once = 1; once != 0; once = 0)

/* All bytes are used once, so they are marked as the first to leave the caches: the L2 is the engine's. `volatile` keeps all loads of a batch before its stores. */
KVD_INLINE Unit kvd_load(u64 address, const u32 bytes) {
    Unit unit = {{0, 0, 0, 0}};
    u16 half;
    if (bytes == 16) {
        asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(unit.word[0]), "=r"(unit.word[1]), "=r"(unit.word[2]), "=r"(unit.word[3])
                     : "l"(address));
    } else if (bytes == 8) {
        asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(unit.word[0]), "=r"(unit.word[1]) : "l"(address));
    } else if (bytes == 4) {
        asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(unit.word[0]) : "l"(address));
    } else if (bytes == 2) {
        asm volatile("ld.global.cs.u16 %0, [%1];" : "=h"(half) : "l"(address));
        unit.word[0] = half;
    } else {
        asm volatile("ld.global.cs.u8 %0, [%1];" : "=r"(unit.word[0]) : "l"(address));
    }
    return unit;
}

KVD_INLINE void kvd_store(u64 address, Unit unit, const u32 bytes) {
    if (bytes == 16) {
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(address), "r"(unit.word[0]), "r"(unit.word[1]), "r"(unit.word[2]), "r"(unit.word[3])
                     : "memory");
    } else if (bytes == 8) {
        asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" :: "l"(address), "r"(unit.word[0]), "r"(unit.word[1]) : "memory");
    } else if (bytes == 4) {
        asm volatile("st.global.cs.u32 [%0], %1;" :: "l"(address), "r"(unit.word[0]) : "memory");
    } else if (bytes == 2) {
        asm volatile("st.global.cs.u16 [%0], %1;" :: "l"(address), "h"((u16)unit.word[0]) : "memory");
    } else {
        asm volatile("st.global.cs.u8 [%0], %1;" :: "l"(address), "r"(unit.word[0]) : "memory");
    }
}

/* From a table that no kernel writes: cached in the L1, also where the table is in pinned memory. */
KVD_INLINE u64 kvd_table(u64 address) {
    u64 value;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
}

KVD_INLINE void kvd_xor_into(u64 address, u32 value) {
    asm volatile("red.global.xor.b32 [%0], %1;" :: "l"(address), "r"(value) : "memory");
}

#else /* the host's C compiler */

#include <stdlib.h>
#include <string.h>

#define KVD_INLINE static inline
#define KVD_CONSTANT static const
#define KVD_UNROLL
#define KVD_EACH_THREAD(thread) for (u32 thread = 0; thread < KVD_CHECKSUM_THREADS; thread += 1)

/* A GPU refuses an access that is not aligned to its size; so do these. */
KVD_INLINE void *kvd_at(u64 address, u32 bytes) {
    if (address == 0 || address % bytes != 0) {
        abort();
    }
    return (void *)address;
}

KVD_INLINE Unit kvd_load(u64 address, const u32 bytes) {
    Unit unit = {{0, 0, 0, 0}};
    memcpy(&unit, kvd_at(address, bytes), bytes);
    return unit;
}

KVD_INLINE void kvd_store(u64 address, Unit unit, const u32 bytes) {
    memcpy(kvd_at(address, bytes), &unit, bytes);
}

KVD_INLINE u64 kvd_table(u64 address) {
    return *(const u64 *)kvd_at(address, 8);
}

KVD_INLINE void kvd_xor_into(u64 address, u32 value) {
    *(u32 *)kvd_at(address, 4) ^= value;
}

#endif

/* ---- Arguments: work.rs says what they mean ------------------------------------------------------------------------------------------------------------ */

struct Cells {
    u64 slots;
    u64 row_table;
    u64 vectors;
    u64 blocks;
    u64 rows;
    u64 row_bytes;
    u64 vectors_per_layer;
    u64 first_layer;
    u64 layers;
    u64 heads;
    u64 slice_first_layer;
    u64 slice_first_head;
    u64 part_layers;
    u64 part_heads;
    u64 head_ranges;
    u64 part_bytes;
    u64 part_stride;
    u64 unit_bytes;
};

struct Vector {
    u64 base;
    i64 page_stride;
    i64 head_stride;
    i64 token_stride;
};

struct Checksums {
    u64 runs;
    u64 results;
    u64 count;
    u64 bytes;
};

/* ---- Gather and scatter --------------------------------------------------------------------------------------------------------------------------------- */

/* A **task** is what a warp moves at once: a cell, or where a cell has more than KVD_CHUNK units, a chunk of it. Its lanes take units 32 apart, so every load and store
 * of a warp is 512 bytes that are contiguous in the slot (four whole lines) and in as few runs of the page as its rows are long: two of 256 bytes for 128 numbers of bf16.
 * Each lane issues its eight loads before its first store: 4 KiB of a warp are under way, with the KVD_CELLS_WARPS_PER_SM warps of a full grid 64 KiB of an SM. To keep
 * an H200 busy (4.8 TB/s, half of it reads, near 800 ns under load) takes some 15 KiB an SM, so there is room for a warp to compute and store while others load.
 *
 * Tasks go round the warps: chunk fastest, then head, K/V, layer, block. So neighbouring warps have neighbouring heads: in pages whose heads are fastest a block of
 * eight warps reads the 2 KiB of each token that lie together at nearly one time, and DRAM sees whole rows. Slots see 4 KiB at a time either way.
 *
 * What is dear is kept off the path: where a warp's next task lies is an addition in mixed radix (no division), where a lane begins in a cell is divided once a thread;
 * two divisions of 32 bits a task (which part) are left.
 *
 * Predicted for an H200, where a device-to-device memcpy moves near 2 TB/s: a task is near 440 instructions a warp, 2 TB/s are 490 million tasks a second, so a quarter of
 * what the schedulers can issue; and twice the needed bytes are under way. So the memory is the limit: 0.9 to 1.0 of memcpy for cells that are contiguous in pages, 0.85
 * to 0.95 for rows of 256 bytes. A row that is no multiple of 32 bytes at such an address costs the sectors at its ends.
 *
 * The grid is bounded (two blocks of 256 threads an SM) and its threads go on by strides, so that three quarters of the threads stay the engine's when both run. (An engine in
 * another process runs in turns with these kernels and not beside them, unless both are clients of MPS: then what counts is that a launch is short.)
 *
 * Tables belong into HBM: each task reads its place, slot and strides there before it can begin, hundreds of bytes that neighbours share, and over PCIe each costs a microsecond.
 */
#define KVD_LANES 32
#define KVD_BATCH 8
#define KVD_CHUNK (KVD_LANES * KVD_BATCH)
#define KVD_CELLS_THREADS 256
#define KVD_CELLS_BLOCKS_PER_SM 2
/* For the compiler: registers of a third block stay free. Four blocks (64 registers) would spill in scatter. */
#define KVD_CELLS_BLOCKS_FIT 3
#define KVD_NO_PAGE 0xffffffffffffffffull

/* A task, or a distance between two. */
typedef struct {
    u32 chunk;
    u32 head;
    u32 vector;
    u32 layer;
    u64 block;
} Task;

/* Where in a cell: its row, and the unit in that row. */
typedef struct {
    u32 row;
    u32 unit;
} Spot;

KVD_INLINE Task kvd_task(const struct Cells *work, u32 chunks, u32 number) {
    Task task;
    task.chunk = number % chunks;
    number /= chunks;
    task.head = number % (u32)work->heads;
    number /= (u32)work->heads;
    task.vector = number % (u32)work->vectors_per_layer;
    number /= (u32)work->vectors_per_layer;
    task.layer = number % (u32)work->layers;
    task.block = number / (u32)work->layers;
    return task;
}

/* One digit of a sum: the carry out of it. */
KVD_INLINE u32 kvd_digit(u32 *digit, u32 add, u32 radix) {
    u32 sum = *digit + add;
    u32 carry = sum >= radix;
    *digit = carry ? sum - radix : sum;
    return carry;
}

KVD_INLINE void kvd_advance(Task *task, const Task *by, const struct Cells *work, u32 chunks) {
    u32 carry = kvd_digit(&task->chunk, by->chunk, chunks);
    carry = kvd_digit(&task->head, by->head + carry, (u32)work->heads);
    carry = kvd_digit(&task->vector, by->vector + carry, (u32)work->vectors_per_layer);
    carry = kvd_digit(&task->layer, by->layer + carry, (u32)work->layers);
    task->block += by->block + carry;
}

/* Zeros from the end of a part's bytes to the next part. */
KVD_INLINE void kvd_clear_end(const struct Cells *work, u64 part, u32 lane, const u32 unit_bytes) {
    const Unit zero = {{0, 0, 0, 0}};
    for (u64 at = work->part_bytes + lane * unit_bytes; at < work->part_stride; at += KVD_LANES * unit_bytes) {
        kvd_store(part + at, zero, unit_bytes);
    }
}

/* Moves one lane's share of a task, whose units begin at `first` and at `spot`. */
KVD_INLINE void kvd_move(const struct Cells *work, const struct Vector *vector, u64 rows, u64 pages, u64 cell, u32 first, Spot spot, u32 per_row, const u32 unit_bytes,
                         const u32 gather) {
    const u32 units = (u32)work->rows * per_row, rows_on = KVD_LANES / per_row, units_on = KVD_LANES % per_row;
    const u32 last_row = (u32)work->rows - 1;
    u64 there[KVD_BATCH];
    u32 column[KVD_BATCH];
    Unit unit[KVD_BATCH];
    /* Without a branch, so that all places are asked for before the first is waited for: a lane beyond the cell's end asks for the last row. */
    KVD_UNROLL
    for (u32 k = 0; k < KVD_BATCH; k += 1) {
        there[k] = kvd_table(rows + (u64)(spot.row < last_row ? spot.row : last_row) * 8);
        column[k] = spot.unit * unit_bytes;
        spot.row += rows_on + kvd_digit(&spot.unit, units_on, per_row);
    }
    KVD_UNROLL
    for (u32 k = 0; k < KVD_BATCH; k += 1) {
        const u64 place = there[k];
        const u64 page = pages + (place >> 32) * (u64)vector->page_stride + (place & 0xffffffffu) * (u64)vector->token_stride + column[k];
        there[k] = place != KVD_NO_PAGE && first + k * KVD_LANES < units ? page : 0;
    }
    const u64 here = cell + (u64)first * unit_bytes;
    KVD_UNROLL
    for (u32 k = 0; k < KVD_BATCH; k += 1) {
        const Unit zero = {{0, 0, 0, 0}};
        unit[k] = zero;
        if (there[k] != 0) {
            unit[k] = kvd_load(gather ? there[k] : here + k * KVD_LANES * unit_bytes, unit_bytes);
        }
    }
    KVD_UNROLL
    for (u32 k = 0; k < KVD_BATCH; k += 1) {
        if (gather) {
            if (first + k * KVD_LANES < units) {
                kvd_store(here + k * KVD_LANES * unit_bytes, unit[k], unit_bytes);
            }
        } else if (there[k] != 0) {
            kvd_store(there[k], unit[k], unit_bytes);
        }
    }
}

/* All tasks of one thread; `thread` and `threads` count over the whole grid. */
KVD_INLINE void kvd_cells(const struct Cells *work, u32 thread, u32 threads, const u32 unit_bytes, const u32 gather) {
    const u32 lane = thread % KVD_LANES;
    const u32 per_row = (u32)work->row_bytes / unit_bytes, units = (u32)work->rows * per_row;
    const u32 chunks = (units + KVD_CHUNK - 1) / KVD_CHUNK;
    const Spot lane_spot = {lane / per_row, lane % per_row};
    const Task by = kvd_task(work, chunks, threads / KVD_LANES);
    Task task = kvd_task(work, chunks, thread / KVD_LANES);
    for (; task.block < work->blocks; kvd_advance(&task, &by, work, chunks)) {
        const u32 layer = (u32)work->first_layer + task.layer;
        const u64 entry = work->vectors + ((u64)layer * work->vectors_per_layer + task.vector) * sizeof(struct Vector);
        struct Vector vector;
        vector.base = kvd_table(entry);
        vector.page_stride = (i64)kvd_table(entry + 8);
        vector.head_stride = (i64)kvd_table(entry + 16);
        vector.token_stride = (i64)kvd_table(entry + 24);
        const u64 slot = kvd_table(work->slots + task.block * 8);
        const u32 of_group = (u32)work->slice_first_layer + layer, head_of_group = (u32)work->slice_first_head + task.head;
        const u32 part_layers = (u32)work->part_layers, part_heads = (u32)work->part_heads;
        const u32 layer_range = of_group / part_layers, head_range = head_of_group / part_heads;
        const u32 layer_in = of_group - layer_range * part_layers, head_in = head_of_group - head_range * part_heads;
        const u64 part = slot + (u64)(layer_range * (u32)work->head_ranges + head_range) * work->part_stride;
        const u32 cell_in = (head_in * part_layers + layer_in) * (u32)work->vectors_per_layer + task.vector;
        const u64 cell = part + (u64)cell_in * units * unit_bytes;
        const u32 first = task.chunk * KVD_CHUNK + lane;
        Spot spot = lane_spot;
        if (task.chunk != 0) {
            spot.row = first / per_row;
            spot.unit = first % per_row;
        }
        const u64 pages = vector.base + task.head * (u64)vector.head_stride;
        kvd_move(work, &vector, work->row_table + task.block * work->rows * 8, pages, cell, first, spot, per_row, unit_bytes, gather);
        const u32 last_cell = part_heads * part_layers * (u32)work->vectors_per_layer - 1;
        if (gather && cell_in == last_cell && task.chunk == chunks - 1) {
            kvd_clear_end(work, part, lane, unit_bytes);
        }
    }
}

KVD_INLINE void kvd_cells_by_unit(const struct Cells *work, u32 thread, u32 threads, const u32 gather) {
    switch (work->unit_bytes) {
    case 16: kvd_cells(work, thread, threads, 16, gather); break;
    case 8: kvd_cells(work, thread, threads, 8, gather); break;
    case 4: kvd_cells(work, thread, threads, 4, gather); break;
    case 2: kvd_cells(work, thread, threads, 2, gather); break;
    default: kvd_cells(work, thread, threads, 1, gather); break;
    }
}

/* ---- Checksums ------------------------------------------------------------------------------------------------------------------------------------------ */

/* CRC-32 is a sum: every 16-byte unit's polynomial times x to the bits behind it, modulo P, all in reflected order (bit 31 is x^0). So a run is dealt to a block's
 * KVD_CHECKSUM_THREADS threads unit by unit, which makes loads of a warp 512 contiguous bytes, and each thread folds its own units: what it has so far, moved on by
 * KVD_CHECKSUM_THREADS units, is added to the next unit's first word, and sixteen lookups reduce the sum to 32 bits and move it on again. A thread's result is so many
 * units too far along; one multiplication by x^(-128 thread) puts it right, and the threads' results are added. Missing units before the first are zeros and add nothing.
 * The first four bytes of a run are inverted, and the result: that is CRC-32's convention for what is no sum.
 *
 * A run longer than KVD_SEGMENT_BYTES is cut into segments, counted from its end (the first may be shorter), each of them a block's: then results are added where they
 * are written, so whoever launches writes zeros there first. Shorter runs are written.
 *
 * Tables: 16 x 256 words of shared memory, made by each block once from 128 words (a table is a sum, too): 16 KiB, so that four blocks fit on every SM from 7.0 on.
 *
 * Predicted for an H200: 32 lanes that look up random bytes wait for near 3.5 turns of the shared memory, so a warp's 512 bytes take 16 x 3.5 = 56 cycles of it, and
 * a multiplication a thread and run adds near a tenth at 64 KiB: 8 bytes a cycle and SM, with 132 SMs at 1.7 to 1.9 GHz 1.7 to 2.0 TB/s, where there are a few hundred
 * segments; near 15 GB/s for one segment alone. Constant bytes (zeros) have no conflicts and go at the memory's speed.
 */
#define KVD_CHECKSUM_THREADS 128
#define KVD_CHECKSUM_BLOCKS_PER_SM 4
#define KVD_UNIT_BYTES 16
#define KVD_SEGMENT_BYTES 131072
#define KVD_SEGMENT_UNITS (KVD_SEGMENT_BYTES / KVD_UNIT_BYTES)
#define KVD_AHEAD 4
#define KVD_POLYNOMIAL 0xedb88320u
#define KVD_SUMS 8

/* x^(31 + 128 KVD_CHECKSUM_THREADS - n): bit n of a unit, moved on by as many units as there are threads. */
KVD_CONSTANT u32 kvd_crc_bits[128] = {
    0x88b6ba63, 0xca1c7287, 0x4f49e34f, 0x9e93c69e, 0xe6568b7d, 0x17dc10bb, 0x2fb82176, 0x5f7042ec,
    0xbee085d8, 0xa6b00df1, 0x96111da3, 0xf7533d07, 0x35d77c4f, 0x6baef89e, 0xd75df13c, 0x75cae439,
    0xeb95c872, 0x0c5a96a5, 0x18b52d4a, 0x316a5a94, 0x62d4b528, 0xc5a96a50, 0x5023d2e1, 0xa047a5c2,
    0x9bfe4dc5, 0xec8d9dcb, 0x026a3dd7, 0x04d47bae, 0x09a8f75c, 0x1351eeb8, 0x26a3dd70, 0x4d47bae0,
    0x9a8f75c0, 0xee6fedc1, 0x07aeddc3, 0x0f5dbb86, 0x1ebb770c, 0x3d76ee18, 0x7aeddc30, 0xf5dbb860,
    0x30c67681, 0x618ced02, 0xc319da04, 0x5d42b249, 0xba856492, 0xae7bcf65, 0x8786988b, 0xd47c3757,
    0x738968ef, 0xe712d1de, 0x1554a5fd, 0x2aa94bfa, 0x555297f4, 0xaaa52fe8, 0x8e3b5991, 0xc707b563,
    0x557e6c87, 0xaafcd90e, 0x8e88b45d, 0xc6606efb, 0x57b1dbb7, 0xaf63b76e, 0x85b6689d, 0xd01dd77b,
    0x7b4aa8b7, 0xf695516e, 0x365ba49d, 0x6cb7493a, 0xd96e9274, 0x69ac22a9, 0xd3584552, 0x7dc18ce5,
    0xfb8319ca, 0x2c7735d5, 0x58ee6baa, 0xb1dcd754, 0xb8c8a8e9, 0xaae05793, 0x8eb1a967, 0xc612548f,
    0x5755af5f, 0xaeab5ebe, 0x8627bb3d, 0xd73e703b, 0x750de637, 0xea1bcc6e, 0x0f469e9d, 0x1e8d3d3a,
    0x3d1a7a74, 0x7a34f4e8, 0xf469e9d0, 0x33a2d5e1, 0x6745abc2, 0xce8b5784, 0x4667a949, 0x8ccf5292,
    0xc2efa365, 0x5eae408b, 0xbd5c8116, 0xa1c8046d, 0x98e10e9b, 0xeab31b77, 0x0e1730af, 0x1c2e615e,
    0x385cc2bc, 0x70b98578, 0xe1730af0, 0x199713a1, 0x332e2742, 0x665c4e84, 0xccb89d08, 0x42003c51,
    0x840078a2, 0xd371f705, 0x7d92e84b, 0xfb25d096, 0x2d3aa76d, 0x5a754eda, 0xb4ea9db4, 0xb2a43d29,
    0xbe397c13, 0xa703fe67, 0x9576fa8f, 0xf19cf35f, 0x3848e0ff, 0x7091c1fe, 0xe12383fc, 0x193601b9,
};

/* x^(-128 n) and x^(-128 * 16 n): back by n units, and by 16 n. */
KVD_CONSTANT u32 kvd_crc_back[16] = {
    0x80000000, 0x12a59a49, 0x8df9403d, 0x9d764201, 0x5139de12, 0x17958e0b, 0xdb1c4863, 0xc31ec6b9,
    0xba340226, 0x6b85d37b, 0x0ba861bc, 0x39b0d61c, 0xfb844d1f, 0xc9771684, 0x8073ef0c, 0xc3f881be,
};
KVD_CONSTANT u32 kvd_crc_back_16[KVD_CHECKSUM_THREADS / 16] = {
    0x80000000, 0x29c45641, 0x12fbc105, 0x8b712bc1, 0xecd30c55, 0x930588dc, 0x3c4c471a, 0x25cd5760,
};

/* x^(8 KVD_SEGMENT_BYTES 2^n): on by 2^n segments. As many as there are make 8 GiB. */
KVD_CONSTANT u32 kvd_crc_segments[16] = {
    0x9fec022a, 0x6c8dedc4, 0x15d6874d, 0x5fde7a4e, 0xbad90e37, 0x2e4e5eef, 0x4eaba214, 0xa8a472c0,
    0x429a969e, 0x148d302a, 0xc40ba6d0, 0xc4e22c3c, 0x40000000, 0x20000000, 0x08000000, 0x00800000,
};

/* A block's shared memory. */
struct Scratch {
    u32 table[16 * 256];
    /* x^(-128 thread) */
    u32 back[KVD_CHECKSUM_THREADS];
    u32 sums[KVD_CHECKSUM_THREADS];
};

KVD_INLINE u32 kvd_crc_times(u32 a, u32 b) {
    u32 product = 0;
    for (u32 bit = 0; bit < 32; bit += 1) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = (b >> 1) ^ (KVD_POLYNOMIAL & (0u - (b & 1u)));
    }
    return product;
}

/* One thread's share of what lasts as long as its block: the table's entries for two bytes, and the way back from its last unit. */
KVD_INLINE void kvd_crc_prepare(struct Scratch *scratch, u32 thread) {
    scratch->back[thread] = kvd_crc_times(kvd_crc_back[thread % 16], kvd_crc_back_16[thread / 16]);
    for (u32 byte = thread; byte < 256; byte += KVD_CHECKSUM_THREADS) {
        KVD_UNROLL
        for (u32 at = 0; at < 16; at += 1) {
            u32 sum = 0;
            KVD_UNROLL
            for (u32 bit = 0; bit < 8; bit += 1) {
                sum ^= kvd_crc_bits[8 * at + bit] & (0u - ((byte >> bit) & 1u));
            }
            scratch->table[256 * at + byte] = sum;
        }
    }
}

/* A unit's 16 bytes to 32 bits. */
KVD_INLINE u32 kvd_crc_fold(const u32 *table, Unit unit) {
    u32 sum = 0;
    KVD_UNROLL
    for (u32 at = 0; at < 16; at += 1) {
        sum ^= table[256 * at + ((unit.word[at / 4] >> (8 * (at % 4))) & 0xffu)];
    }
    return sum;
}

/* One thread's share of the units from `first` to `end` of a run. */
KVD_INLINE u32 kvd_crc_share(const struct Scratch *scratch, u64 run, u64 first, u64 end, u32 thread) {
    const u32 units = (u32)(end - first), rounds = (units + KVD_CHECKSUM_THREADS - 1) / KVD_CHECKSUM_THREADS;
    const u32 missing = rounds * KVD_CHECKSUM_THREADS - units;
    const u64 from = run + (first + thread - missing) * KVD_UNIT_BYTES; /* before the run for a missing unit, which is not read */
    u32 sum = 0;
    for (u32 round = 0; round < rounds; round += KVD_AHEAD) {
        Unit unit[KVD_AHEAD];
        KVD_UNROLL
        for (u32 k = 0; k < KVD_AHEAD; k += 1) {
            const u32 number = (round + k) * KVD_CHECKSUM_THREADS + thread;
            const Unit zero = {{0, 0, 0, 0}};
            unit[k] = zero;
            if (round + k < rounds && number >= missing) {
                unit[k] = kvd_load(from + (u64)(round + k) * (KVD_CHECKSUM_THREADS * KVD_UNIT_BYTES), KVD_UNIT_BYTES);
                if (first == 0 && number == missing) {
                    unit[k].word[0] ^= 0xffffffffu;
                }
            }
        }
        KVD_UNROLL
        for (u32 k = 0; k < KVD_AHEAD; k += 1) {
            if (round + k < rounds) {
                unit[k].word[0] ^= sum;
                sum = kvd_crc_fold(scratch->table, unit[k]);
            }
        }
    }
    return sum;
}

/* Adds what the threads found, moves it on by the segments behind and writes it. */
KVD_INLINE void kvd_crc_write(const struct Scratch *scratch, u64 result, u32 segment, u32 segments) {
    u32 sum = 0;
    KVD_UNROLL
    for (u32 k = 0; k < KVD_SUMS; k += 1) {
        sum ^= scratch->sums[k];
    }
    for (u32 power = 0, left = segment; left != 0; power += 1, left >>= 1) {
        if (left & 1u) {
            sum = kvd_crc_times(sum, kvd_crc_segments[power]);
        }
    }
    if (segments == 1) {
        const Unit unit = {{sum ^ 0xffffffffu, 0, 0, 0}};
        kvd_store(result, unit, 4);
    } else {
        kvd_xor_into(result, segment == segments - 1 ? sum ^ 0xffffffffu : sum);
    }
}

/* All segments of one block; `segment` counts from a run's end. */
KVD_INLINE void kvd_checksum_block(const struct Checksums *work, u32 block, u32 blocks, struct Scratch *scratch) {
    const u64 units = work->bytes / KVD_UNIT_BYTES;
    const u32 segments = (u32)((units + KVD_SEGMENT_UNITS - 1) / KVD_SEGMENT_UNITS);
    u32 segment = block % segments;
    u64 run = block / segments;
    KVD_EACH_THREAD(thread) {
        kvd_crc_prepare(scratch, thread);
    }
    while (run < work->count) {
        KVD_EACH_THREAD(thread) {
            const u64 end = units - (u64)segment * KVD_SEGMENT_UNITS;
            const u64 first = end > KVD_SEGMENT_UNITS ? end - KVD_SEGMENT_UNITS : 0;
            const u32 share = kvd_crc_share(scratch, kvd_table(work->runs + run * 8), first, end, thread);
            scratch->sums[thread] = kvd_crc_times(share, scratch->back[thread]);
        }
        KVD_EACH_THREAD(thread) {
            if (thread < KVD_SUMS) {
                u32 sum = 0;
                for (u32 at = thread; at < KVD_CHECKSUM_THREADS; at += KVD_SUMS) {
                    sum ^= scratch->sums[at];
                }
                scratch->sums[thread] = sum;
            }
        }
        KVD_EACH_THREAD(thread) {
            if (thread == 0) {
                kvd_crc_write(scratch, work->results + run * 4, segment, segments);
            }
        }
        run += blocks / segments + kvd_digit(&segment, blocks % segments, segments);
    }
}

/* ---- Entry points --------------------------------------------------------------------------------------------------------------------------------------- */

#ifdef __CUDACC__

extern "C" __global__ void __launch_bounds__(KVD_CELLS_THREADS, KVD_CELLS_BLOCKS_FIT) kvd_gather(const struct Cells work) {
    kvd_cells_by_unit(&work, blockIdx.x * KVD_CELLS_THREADS + threadIdx.x, gridDim.x * KVD_CELLS_THREADS, 1);
}

extern "C" __global__ void __launch_bounds__(KVD_CELLS_THREADS, KVD_CELLS_BLOCKS_FIT) kvd_scatter(const struct Cells work) {
    kvd_cells_by_unit(&work, blockIdx.x * KVD_CELLS_THREADS + threadIdx.x, gridDim.x * KVD_CELLS_THREADS, 0);
}

extern "C" __global__ void __launch_bounds__(KVD_CHECKSUM_THREADS, KVD_CHECKSUM_BLOCKS_PER_SM) kvd_checksum(const struct Checksums work) {
    __shared__ struct Scratch scratch;
    kvd_checksum_block(&work, blockIdx.x, gridDim.x, &scratch);
}

#endif
