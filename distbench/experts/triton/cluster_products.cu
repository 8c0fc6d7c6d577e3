// Grouped matrix products of Hopper's own means: weights as rows of wgmma, tokens as its columns.
//
// A cluster of two blocks computes 256 rows of weights by up to 2 * PLACES places of one expert: the blocks share the
// weights (each loads half of them for both) and split the places evenly, so that a product is as wide as it has to be.
// In a block one warp keeps TMA loads in flight, and two warpgroups multiply 2 x 64 rows each. With FP8 the products of
// 128 columns of K leave the matrix unit's accumulators, whose sums have few bits, for float32 registers.
//
// Compiled with NAME, STAGE (1: gate and up, SiLU; 2: down, routing weight), FP8, ROW_BYTES (of K), COLUMNS (of the
// output), LOCAL (width of the experts' table), DEPTH (tiles of K in flight) and PLACES.

constexpr int K_BYTES = 128, STEPS = ROW_BYTES / K_BYTES;
constexpr int HALF_BYTES = 128 * K_BYTES, WEIGHT_BYTES = 2 * HALF_BYTES, ROWS_BYTES = PLACES * K_BYTES,
              SCALE_BYTES = 512;
// A load begins at a multiple of 16 bytes.
constexpr int LOADED_SCALES = PLACES + 4;
constexpr int PITCH = 144, STAGED_BYTES = PLACES * PITCH;
constexpr int TILE_COLUMNS = STAGE == 1 ? 128 : 256, COLUMN_TILES = COLUMNS / TILE_COLUMNS;
constexpr int MULTIPLIERS = 256, THREADS = 384;

struct Shared {
    char weights[DEPTH][WEIGHT_BYTES];
    char rows[DEPTH][ROWS_BYTES];
    char scales[FP8 ? DEPTH : 1][SCALE_BYTES];
    char staged[2][STAGED_BYTES];
    float factors[2][PLACES];
    int experts[3 * LOCAL];
    u64 full[DEPTH], empty[DEPTH];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the size that the launch is given");

struct Tile {
    int expert, column, start, live, width;
};

// The tile of an item: experts in turn, columns of one, and for each the tiles of places, which share the weights.
__device__ __forceinline__ Tile locate(const Shared& shared, int item, int rank, int lane) {
    int number = item / COLUMN_TILES, expert = -1;
#pragma unroll
    for (int base = 0; base < LOCAL; base += 32) {
        bool begun = base + lane < LOCAL && shared.experts[2 * LOCAL + min(base + lane, LOCAL - 1)] <= number;
        expert += __popc(__ballot_sync(~0u, begun));
    }
    int count = shared.experts[LOCAL + expert];
    int within = item - shared.experts[2 * LOCAL + expert] * COLUMN_TILES;
    int pairs = (count + 2 * PLACES - 1) / (2 * PLACES);
    int each = ((count + 2 * pairs - 1) / (2 * pairs) + 7) / 8 * 8;
    int begin = (within % pairs * 2 + rank) * each;
    int width = each <= 64 ? (each + 15) / 16 * 16 : each;
    return {expert, within / pairs, shared.experts[expert] + begin, max(0, min(count - begin, each)), width};
}

struct Given {
    const float* weight_scales;
    const float* routing;
    void* output;
    float* output_scales;
    int stride;
};

struct Ring {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
};

// The products of one tile, weights [2 x 64 of this warpgroup] by places [WIDTH].
template <int WIDTH>
__device__ __forceinline__ void multiply(Shared& shared, Ring& ring, const Tile& tile, const Given& given,
                                         float (&total)[2][WIDTH / 2]) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) total[0][i] = total[1][i] = 0;
    if constexpr (FP8) {
        // Blocks of 128 columns of the output: gate and up, or neighbours.
        constexpr int BLOCKS = COLUMNS / 128;
        const int number = STAGE == 1 ? 2 * tile.expert * BLOCKS + tile.column : tile.expert * BLOCKS + 2 * tile.column;
        const float* scales0 = given.weight_scales + number * STEPS;
        const float* scales1 = scales0 + (STAGE == 1 ? BLOCKS : 1) * STEPS;
        float next[2] = {__ldg(scales0), __ldg(scales1)};
        for (int step = 0; step < STEPS; ++step) {
            const float weight_scale[2] = {next[0], next[1]};
            int later = min(step + 1, STEPS - 1);
            next[0] = __ldg(scales0 + later), next[1] = __ldg(scales1 + later);
            await(shared.full[ring.slot], ring.phase);
            const u64 left = descriptor(address_of(shared.weights[ring.slot]) + group * 64 * K_BYTES);
            const u64 right = descriptor(address_of(shared.rows[ring.slot]));
            const float* scales =
                reinterpret_cast<const float*>(shared.scales[ring.slot]) + tile.start % 4 + lane % 4 * 2;
            // Weights' scales are powers of two: their quotient is a difference of exponents, and products with it are
            // exact, unless a place's scale times the first leaves the range of float32.
            const float quotient = weight_scale[1] * __int_as_float(0x7F000000 - __float_as_int(weight_scale[0]));
            float factors[WIDTH / 4];
#pragma unroll
            for (int block = 0; block < 2; ++block) {
                float part[WIDTH / 2];
                hold(part);
                open_products();
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    Product<WIDTH>::add(part, left + (block * HALF_BYTES >> 4) + 2 * k, right + 2 * k, k);
                commit_products();
#pragma unroll
                for (int i = 0; i < WIDTH / 4; ++i)
                    factors[i] = block == 0 ? scales[i / 2 * 8 + i % 2] * weight_scale[0] : factors[i] * quotient;
                hold(factors);
                await_products<0>();
                hold(part);
#pragma unroll
                for (int i = 0; i < WIDTH / 2; ++i) total[block][i] += part[i] * factors[i / 4 * 2 + i % 2];
            }
            __syncwarp();
            if (lane < 2) arrive_at(shared.empty[ring.slot], lane);
            ring.advance();
        }
    } else {
        int before = 0;
        for (int step = 0; step < STEPS; ++step) {
            await(shared.full[ring.slot], ring.phase);
            const u64 left = descriptor(address_of(shared.weights[ring.slot]) + group * 64 * K_BYTES);
            const u64 right = descriptor(address_of(shared.rows[ring.slot]));
            hold(total[0]), hold(total[1]);
            open_products();
#pragma unroll
            for (int block = 0; block < 2; ++block)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    Product<WIDTH>::add(total[block], left + (block * HALF_BYTES >> 4) + 2 * k, right + 2 * k, 1);
            commit_products();
            if (step > 0) {
                await_products<1>();
                if (lane < 2) arrive_at(shared.empty[before], lane);
            }
            before = ring.slot;
            ring.advance();
        }
        await_products<0>();
        hold(total[0]), hold(total[1]);
        if (lane < 2) arrive_at(shared.empty[before], lane);
    }
}

__device__ __forceinline__ float activate(float gate, float up) {
    return gate * __fdividef(1.0f, 1.0f + __expf(-gate)) * up;
}

// Copies the staged rows of `LINES` x 16 bytes that are live to their places.
template <int COUNT, int LINES>
__device__ __forceinline__ void write_rows(const char* staged, char* to, long long pitch, int live, int thread) {
    for (int i = thread; i < live * LINES; i += COUNT)
        *reinterpret_cast<uint4*>(to + i / LINES * pitch + i % LINES * 16) =
            *reinterpret_cast<const uint4*>(staged + i / LINES * PITCH + i % LINES * 16);
}

// Stores pairs of bf16 [64 columns of this warpgroup] by places [WIDTH] through shared memory.
template <int WIDTH>
__device__ __forceinline__ void write_bf16(Shared& shared, const float (&values)[WIDTH / 2], char* to, long long pitch,
                                           int live) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    u32 staged = address_of(shared.staged[group]) + (lane / 16 * 8 + lane % 8) * PITCH + warp * 32 + lane / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j += 2) {
        // The last of an odd number of matrices is written twice.
        const int k = min(j + 1, WIDTH / 8 - 1), shift = j + 1 < WIDTH / 8 ? 0 : lane / 16 * 8;
        store_transposed(staged + (8 * j - shift) * PITCH, bf16_pair(values[4 * j], values[4 * j + 1]),
                         bf16_pair(values[4 * j + 2], values[4 * j + 3]), bf16_pair(values[4 * k], values[4 * k + 1]),
                         bf16_pair(values[4 * k + 2], values[4 * k + 3]));
    }
    synchronize<128>(1 + group);
    write_rows<128, 8>(shared.staged[group], to, pitch, live, threadIdx.x % 128);
    synchronize<128>(1 + group);
}

// The smallest power of two by which amax fits e4m3 (at most 448) when divided; 1 where amax is 0.
__device__ __forceinline__ float power_of_two_scale(float amax) {
    return amax > 1e-30f ? __int_as_float(((__float_as_int(amax) + 0x1FFFFF) & 0x7F800000) - (8 << 23)) : 1.0f;
}

// Quantises the activation [128 columns] of each place, and stores it with its scale.
template <int WIDTH>
__device__ __forceinline__ void write_e4m3(Shared& shared, const float (&values)[WIDTH / 2], const Tile& tile,
                                           const Given& given) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float (*most)[PLACES] = reinterpret_cast<float (*)[PLACES]>(shared.staged[1]);
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
        float even = fmaxf(fabsf(values[4 * j]), fabsf(values[4 * j + 2])),
              odd = fmaxf(fabsf(values[4 * j + 1]), fabsf(values[4 * j + 3]));
#pragma unroll
        for (int far = 4; far < 32; far *= 2) {
            even = fmaxf(even, __shfl_xor_sync(~0u, even, far));
            odd = fmaxf(odd, __shfl_xor_sync(~0u, odd, far));
        }
        if (lane < 4) *reinterpret_cast<float2*>(&most[warp][8 * j + 2 * lane]) = {even, odd};
    }
    synchronize<MULTIPLIERS>(3);
    if (threadIdx.x < WIDTH) {
        float amax = 0;
#pragma unroll
        for (int i = 0; i < MULTIPLIERS / 32; ++i) amax = fmaxf(amax, most[i][threadIdx.x]);
        float scale = power_of_two_scale(amax);
        shared.factors[0][threadIdx.x] = 1.0f / scale;
        if (threadIdx.x < tile.live)
            given.output_scales[static_cast<long long>(tile.column) * given.stride + tile.start + threadIdx.x] = scale;
    }
    synchronize<MULTIPLIERS>(3);
    u32 staged = address_of(shared.staged[0]) + lane * PITCH + warp * 16;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j += 4) {
        u32 packed[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const int k = min(j + m, WIDTH / 8 - 1);
            float2 factor = *reinterpret_cast<const float2*>(&shared.factors[0][8 * k + lane % 4 * 2]);
            packed[m] = e4m3_pair(values[4 * k] * factor.x, values[4 * k + 2] * factor.x) |
                        e4m3_pair(values[4 * k + 1] * factor.y, values[4 * k + 3] * factor.y) << 16;
        }
        const int beyond = max(0, lane / 8 + j - (WIDTH / 8 - 1));
        store_transposed(staged + (j - beyond) * 8 * PITCH, packed[0], packed[1], packed[2], packed[3]);
    }
    synchronize<MULTIPLIERS>(3);
    char* to = static_cast<char*>(given.output) + static_cast<long long>(tile.start) * COLUMNS + tile.column * 128;
    write_rows<MULTIPLIERS, 8>(shared.staged[0], to, COLUMNS, tile.live, threadIdx.x);
}

template <int WIDTH>
__device__ __forceinline__ void compute(Shared& shared, Ring& ring, const Tile& tile, const Given& given) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    float routing = STAGE == 2 && thread < tile.live ? __ldg(given.routing + tile.start + thread) : 0.0f;
    float total[2][WIDTH / 2];
    multiply<WIDTH>(shared, ring, tile, given, total);
    char* to = static_cast<char*>(given.output) +
               (static_cast<long long>(tile.start) * COLUMNS + tile.column * TILE_COLUMNS + group * 64) * 2;
    if constexpr (STAGE == 1) {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) total[0][i] = activate(total[0][i], total[1][i]);
        if constexpr (FP8) {
#pragma unroll
            for (int i = 0; i < WIDTH / 2; i += 2) {
                u32 both = bf16_pair(total[0][i], total[0][i + 1]);
                total[0][i] = __uint_as_float(both << 16), total[0][i + 1] = __uint_as_float(both & 0xFFFF0000u);
            }
            write_e4m3<WIDTH>(shared, total[0], tile, given);
        } else {
            write_bf16<WIDTH>(shared, total[0], to, 2LL * COLUMNS, tile.live);
        }
    } else {
        if (thread < WIDTH) shared.factors[group][thread] = routing;
        synchronize<128>(1 + group);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                float2 factor = *reinterpret_cast<const float2*>(&shared.factors[group][8 * j + thread % 4 * 2]);
                total[block][4 * j] *= factor.x, total[block][4 * j + 2] *= factor.x;
                total[block][4 * j + 1] *= factor.y, total[block][4 * j + 3] *= factor.y;
            }
            write_bf16<WIDTH>(shared, total[block], to + block * 256, 2LL * COLUMNS, tile.live);
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void compute_width(Shared& shared, Ring& ring, const Tile& tile, const Given& given) {
    if (tile.width == WIDTH)
        compute<WIDTH>(shared, ring, tile, given);
    else if constexpr (WIDTH < PLACES)
        compute_width<(WIDTH < 64 ? WIDTH + 16 : WIDTH + 8)>(shared, ring, tile, given);
}

__device__ __forceinline__ void load_tile(Shared& shared, Ring& ring, const Tile& tile, int rank,
                                          const TensorMap& weights, const TensorMap (&rows)[4],
                                          const TensorMap& scales) {
    const int matrix = STAGE == 1 ? 2 * tile.expert + rank : tile.expert;
    const int group = STAGE == 1 ? tile.column * 8 : tile.column * 16 + rank * 8;
    const u32 bytes = WEIGHT_BYTES + tile.width * K_BYTES + (FP8 ? LOADED_SCALES * 4 : 0);
    for (int step = 0; step < STEPS; ++step) {
        await(shared.empty[ring.slot], ring.phase ^ 1);
        u64& full = shared.full[ring.slot];
        expect(full, bytes);
        load_weights(shared.weights[ring.slot] + rank * HALF_BYTES, weights, full, step * K_BYTES, group, matrix);
        int loaded = 0;
#pragma unroll
        for (int size = 64, i = 0; size >= 8; size /= 2, ++i)
            if (tile.width & size) {
                load_matrix(shared.rows[ring.slot] + loaded * K_BYTES, rows[i], full, step * K_BYTES,
                            tile.start + loaded);
                loaded += size;
            }
        if constexpr (FP8) load_matrix(shared.scales[ring.slot], scales, full, tile.start / 4 * 4, step);
        ring.advance();
    }
}

struct Maps {
    TensorMap weights, rows[4], scales;
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    NAME(const __grid_constant__ Maps maps, const int* experts, const int* tiles, const Given given) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32;
    u32 rank, cluster, clusters;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));
    for (int i = threadIdx.x; i < 3 * LOCAL; i += THREADS) shared.experts[i] = experts[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; ++i) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&shared.full[i])), "r"(1));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&shared.empty[i])),
                         "r"(2 * MULTIPLIERS / 32));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    synchronize_cluster();
    const int items = tiles[0] * COLUMN_TILES;
    Ring ring;
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < MULTIPLIERS + 32) {
            for (int item = cluster; item < items; item += clusters) {
                Tile tile = locate(shared, item, rank, lane);
                if (lane == 0) load_tile(shared, ring, tile, rank, maps.weights, maps.rows, maps.scales);
                __syncwarp();
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        for (int item = cluster; item < items; item += clusters)
            compute_width<16>(shared, ring, locate(shared, item, rank, lane), given);
    }
    __syncwarp();
    synchronize_cluster();
}
