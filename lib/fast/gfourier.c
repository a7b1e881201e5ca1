/* Group convolution by the Fourier transform of the point group, and the rest of a block (batch
   norm, ReLU, blur pool), in single precision on a CPU. gfourier.py derives the method. Arrays are
   contiguous; sizes are in C order.

   A layer's output is cut into blocks of a few rows, a block into panels of PANEL pixels. For each
   block the patches of a slab of channels are gathered and transformed, multiplied by the
   transformed filters, and the result is transformed back: the patches are never in memory as a
   whole. Transformed arrays have one matrix per entry, with its rows in tiles:
   (entries, tiles, panels, rows of a tile, PANEL).

   Each thread takes jobs from its own run of neighbouring jobs, which stay in its cache, then from
   the others' runs: a thread that has to wait for a processor does not hold up the rest. Which
   thread does a job never changes a result. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

int omp_get_thread_num(void); /* of the OpenMP that PyTorch has loaded; its header may be missing */

#if defined(__AVX512F__)
#define LANES 16
#define LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* or GCC loads x again for each product */
#elif defined(__AVX2__)
#define LANES 8
#define LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#define IN_REGISTER(x)
#else
#define LANES 4
#define LOW {0, 4, 1, 5}
#define HIGH {2, 6, 3, 7}
#define IN_REGISTER(x)
#endif
#define PANEL (2 * LANES)
#define TILE (LANES == 16 ? 8 : 4) /* fields of a tile of a product, TILE x PANEL, in registers */
#define LEFT (LANES == 4 ? 2 : 4)  /* a tile of the filters' gradient is LEFT rows x RIGHT fields */
#define RIGHT (LANES / LEFT)
/* Pixels of a block and channels of a slab, about, measured on an AVX-512 processor with 1 MB of
   second-level cache per core; so are rows' tiles of a group and bytes of scratch memory. */
#define BLOCK 128
#define SLAB 8
#define GRADIENT_BLOCK 512
#define GRADIENT_SLAB 16
#define GATHERED 4 /* channels at a time of such a slab: their patches fit into that cache */
#define GROUP 2
#define SCRATCH (1L << 20)
#define STEP(n) (ROUND(n, 16) | 16) /* odd in lines of the cache, so that entries share no sets */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define ROUND(a, b) (CEIL(a, b) * (b))
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES)));

/* Mirrored by gkernel.py. */
typedef struct {
    int order, lifting, n, channels, fields, taps, height, width, out_height, out_width;
    int stride, padding, kernel_size, threads;
    long next_field, next_channel; /* floats from one to the next filter of the weight */
    const int *offsets;   /* (taps, order, 2): row and column of A(u) t in the window */
    const int *cells;     /* (taps, order): place of phi[t](h) in a filter of the weight */
    const float *shares;  /* (taps): one over the size of the tap's stabilizer */
    const float *factors; /* (entries, order): the transform of filters */
} Layer;

/* A thread's jobs, in a line of the cache of their own. */
typedef struct {
    int next, end;
} __attribute__((aligned(64))) Jobs;

static void share(Jobs *jobs, int threads, int count) {
    for (int i = 0; i < threads; i++)
        jobs[i] = (Jobs){(long)count * i / threads, (long)count * (i + 1) / threads};
}

static int next_job(Jobs *jobs, int threads) {
    for (int i = 0; i < threads; i++) {
        Jobs *of = jobs + (omp_get_thread_num() + i) % threads;
        if (__atomic_load_n(&of->next, __ATOMIC_RELAXED) >= of->end) continue;
        int job = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED);
        if (job < of->end) return job;
    }
    return -1;
}
/* A region of all threads, which share `count` jobs. */
#define PARALLEL(count) share(jobs, threads, count); _Pragma("omp parallel num_threads(threads)")
#define FOR_JOBS(job) for (int job; (job = next_job(jobs, threads)) >= 0;)

/* The calling thread allocates the scratch memory of all threads, in whole lines of the cache: what
   another thread allocates is given back to the system at the end of each call. */
static float *scratch(long floats) { return aligned_alloc(64, 4 * ROUND(floats, 16)); }

static float *take(float **memory, long floats) {
    float *array = *memory;
    *memory += ROUND(floats, 16);
    return array;
}

/* The transforms over the group, of T: one pixel or LANES neighbouring ones. x[u] + at are the
   elements, o[f * step] the entries: of patches or, if `gradient`, of the output's gradient. D and
   E are the parts of x that the irrep of dimension 2 sees. */
#define AT(u) (*(number *)(x[u] + at))
#define ENTRY(f) (*(number *)(o + (f) * step))
#define TRANSFORMS(T)                                                                              \
    INLINE void analyse_##T(int order, int gradient, const float *const *x, long at, float *o,     \
                            long step) {                                                           \
        typedef T number;                                                                          \
        T in[8];                                                                                   \
        for (int u = 0; u < order; u++) {                                                          \
            in[u] = *(const number *)(x[u] + at);                                                  \
            IN_REGISTER(in[u]);                                                                    \
        }                                                                                          \
        T s0 = in[0] + in[2], s1 = in[1] + in[3], D0 = in[0] - in[2], D1 = in[1] - in[3];          \
        if (order == 4) {                                                                          \
            ENTRY(0) = s0 + s1, ENTRY(1) = s0 - s1, ENTRY(2) = D0 - D1;                            \
            ENTRY(3) = gradient ? -D1 : D0, ENTRY(4) = gradient ? D0 : D1;                         \
            return;                                                                                \
        }                                                                                          \
        T t0 = in[4] + in[6], t1 = in[5] + in[7], E0 = in[4] - in[6], E1 = in[5] - in[7];          \
        T a = s0 + s1, b = t0 + t1, c = s0 - s1, d = t0 - t1;                                      \
        T y00 = D0 - E0, y01 = E1 - D1, y10 = D1 + E1, y11 = D0 + E0;                              \
        ENTRY(0) = a + b, ENTRY(1) = a - b, ENTRY(2) = c + d, ENTRY(3) = c - d;                    \
        if (gradient) {                                                                            \
            ENTRY(4) = 2 * D0, ENTRY(5) = y10 - y11, ENTRY(6) = y01 + y11, ENTRY(7) = y00 + y10;   \
            ENTRY(8) = y01 - y00, ENTRY(9) = y11, ENTRY(10) = y00;                                 \
        } else {                                                                                   \
            ENTRY(4) = D0, ENTRY(5) = y10 + y11, ENTRY(6) = y00, ENTRY(7) = y11;                   \
            ENTRY(8) = y00 + y01, ENTRY(9) = y10 - y00, ENTRY(10) = y01 - y11;                     \
        }                                                                                          \
    }                                                                                              \
    /* The output from the entries of the products, and sums of its deviations from `centre` and   \
       of their squares; the group's sums of d0 to e1 and of c and d are zero. */                  \
    INLINE void synthesise_##T(int order, float *o, long step, float bias, float centre,           \
                               float *const *x, long at, T *sums) {                                \
        typedef T number;                                                                          \
        T a = ENTRY(0) + bias, off = a - centre;                                                   \
        if (order == 4) {                                                                          \
            T c = ENTRY(1), d0 = ENTRY(2) + ENTRY(4), d1 = -ENTRY(2) - ENTRY(3);                   \
            AT(0) = a + c + d0, AT(1) = a - c + d1, AT(2) = a + c - d0, AT(3) = a - c - d1;        \
            sums[0] += 4 * off, sums[1] += 4 * (off * off + c * c) + 2 * (d0 * d0 + d1 * d1);      \
            return;                                                                                \
        }                                                                                          \
        T b = ENTRY(1), c = ENTRY(2), d = ENTRY(3);                                                \
        T y00 = ENTRY(4) + ENTRY(7) - ENTRY(8) + ENTRY(10), y01 = ENTRY(6) + ENTRY(8);             \
        T y10 = ENTRY(5) + ENTRY(7), y11 = ENTRY(4) - ENTRY(5) + ENTRY(6) + ENTRY(9);              \
        T d0 = y00 + y11, d1 = y10 - y01, e0 = y11 - y00, e1 = y01 + y10;                          \
        T p = a + b + (c + d), q = a + b - (c + d), r = a - b + (c - d), s = a - b - (c - d);      \
        AT(0) = p + d0, AT(1) = q + d1, AT(2) = p - d0, AT(3) = q - d1;                            \
        AT(4) = r + e0, AT(5) = s + e1, AT(6) = r - e0, AT(7) = s - e1;                            \
        sums[0] += 8 * off;                                                                        \
        sums[1] += 8 * (off * off + b * b + c * c + d * d) +                                       \
                   2 * (d0 * d0 + d1 * d1 + e0 * e0 + e1 * e1);                                    \
    }
TRANSFORMS(vec)
TRANSFORMS(float)

/* n pixels of one panel, from x[u] + at + i * stride. */
INLINE void analyse(int order, int gradient, const float *const *x, long at, int stride, float *o,
                    long step, int n) {
    int i = 0;
    for (; stride == 1 && i + LANES <= n; i += LANES)
        analyse_vec(order, gradient, x, at + i, o + i, step);
    for (; i < n; i++) analyse_float(order, gradient, x, at + (long)i * stride, o + i, step);
}

INLINE void synthesise(int order, float *o, long step, float bias, float centre, float *const *y,
                       long at, int n, vec *sums) {
    float rest[2] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        synthesise_vec(order, o + i, step, bias, centre, y, at + i, sums);
    for (; i < n; i++) synthesise_float(order, o + i, step, bias, centre, y, at + i, rest);
    sums[0][0] += rest[0], sums[1][0] += rest[1];
}

/* c (m, PANEL) = or, if add, += the transpose of a (k, TILE) times b (k, PANEL). */
#define MULTIPLY(M)                                                                                \
    do {                                                                                           \
        vec sum[M][2];                                                                             \
        for (int r = 0; r < M; r++) sum[r][0] = sum[r][1] = (vec){0};                              \
        for (int l = 0; l < k; l++) {                                                              \
            vec b0 = *(const vec *)(b + l * PANEL), b1 = *(const vec *)(b + l * PANEL + LANES);    \
            IN_REGISTER(b0);                                                                       \
            IN_REGISTER(b1);                                                                       \
            for (int r = 0; r < M; r++)                                                            \
                sum[r][0] += a[l * TILE + r] * b0, sum[r][1] += a[l * TILE + r] * b1;              \
        }                                                                                          \
        for (int r = 0; r < M; r++)                                                                \
            for (int v = 0; v < 2; v++) {                                                          \
                vec *to = (vec *)(c + r * PANEL + v * LANES);                                      \
                if (add) sum[r][v] += *to;                                                         \
                *to = sum[r][v];                                                                   \
            }                                                                                      \
    } while (0)

static void multiply(int m, int k, const float *restrict a, const float *restrict b,
                     float *restrict c, int add) {
    if (TILE == 8 && m > 4) MULTIPLY(TILE);
    else if (m > 2) MULTIPLY(4);
    else if (m == 2) MULTIPLY(2);
    else MULTIPLY(1);
}

/* Halves of two vectors added, interleaved: after all rounds lane i is the sum over sum[i]. */
INLINE vec fold(vec a, vec b) {
    return __builtin_shuffle(a, b, (ivec)LOW) + __builtin_shuffle(a, b, (ivec)HIGH);
}
#define FOLD1(i) fold(sum[i], sum[(i) + LANES / 2])
#define FOLD2(i) fold(FOLD1(i), FOLD1((i) + LANES / 4))
#define FOLD3(i) fold(FOLD2(i), FOLD2((i) + LANES / 8))
#define FOLD4(i) fold(FOLD3(i), FOLD3((i) + LANES / 16))

/* c (LEFT, RIGHT) += the sums over all pixels of a (panels, LEFT, PANEL) times b (panels, RIGHT,
   PANEL). */
static void correlate(int panels, const float *a, const float *b, float *c) {
    vec sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (vec){0};
    for (int j = 0; j < panels; j++, a += LEFT * PANEL, b += RIGHT * PANEL)
        for (int v = 0; v < PANEL; v += LANES) {
            vec right[RIGHT];
            for (int i = 0; i < RIGHT; i++) {
                right[i] = *(const vec *)(b + i * PANEL + v);
                IN_REGISTER(right[i]);
            }
            for (int r = 0; r < LEFT; r++) {
                vec left = *(const vec *)(a + r * PANEL + v);
                IN_REGISTER(left);
                for (int i = 0; i < RIGHT; i++) sum[r * RIGHT + i] += left * right[i];
            }
        }
    *(vec *)c += LANES == 16 ? FOLD4(0) : LANES == 8 ? FOLD3(0) : FOLD2(0);
}

/* How a layer's output is cut, in blocks of about `pixels`. */
typedef struct {
    int maps, entries, rows, blocks, panels, tall, wide;
    long plane, pixels, window; /* pixels of the input and output; floats of a block's input */
} Plan;

static Plan plan(const Layer *q, int pixels) {
    Plan s;
    s.maps = q->lifting ? 1 : q->order, s.entries = q->order == 8 ? 11 : 5;
    s.rows = MIN(MAX(pixels / q->out_width, 1), q->out_height);
    s.blocks = CEIL(q->out_height, s.rows), s.panels = CEIL(s.rows * q->out_width, PANEL);
    s.tall = (s.rows - 1) * q->stride + q->kernel_size;
    s.wide = ROUND(q->width + 2 * q->padding, 16); /* rows begin with a line of the cache */
    s.plane = (long)q->height * q->width, s.pixels = (long)q->out_height * q->out_width;
    s.window = (long)s.maps * s.tall * s.wide + 16;
    return s;
}

/* Where row r of panel j is, in tiles of `rows`. */
INLINE long place(int r, int j, int rows, int panels) {
    return (((long)(r / rows) * panels + j) * rows + r % rows) * PANEL;
}

/* One channel under the output rows from `row`, into the window (maps, tall, wide), whose border of
   columns is zero. */
static void load_window(const Layer *q, const Plan *s, const float *x, int row, float *window) {
    for (int u = 0; u < s->maps; u++)
        for (int r = 0; r < s->tall; r++) {
            const int source = row * q->stride + r - q->padding;
            const float *from = x + u * s->plane + (long)source * q->width;
            float *to = window + (u * s->tall + r) * s->wide + q->padding;
            if (source < 0 || source >= q->height) {
                memset(to, 0, 4 * q->width);
                continue;
            }
            int i = 0; /* these short rows are not worth a call of memcpy */
            for (; i + LANES <= q->width; i += LANES) *(vec *)(to + i) = *(const vec *)(from + i);
            for (; i < q->width; i++) to[i] = from[i];
        }
}

/* Transformed patches, in tiles of k rows, of `width` channels from c0 of one image. */
static void gather(const Layer *q, const Plan *s, const float *x, int image, int c0, int width,
                   int row, int rows, float *window, float *p, long step, int k) {
    x += ((long)image * q->channels + c0) * s->maps * s->plane;
    for (int c = 0; c < width; c++, x += s->maps * s->plane) {
        load_window(q, s, x, row, window);
        for (int t = 0; t < q->taps; t++) {
            float *to = p + place(c * q->taps + t, 0, k, s->panels);
            /* a map of the next channel, which the processor does not foresee, for each tap */
            const float *in[8], *next = x + (s->maps + t) * s->plane;
            next += (long)row * q->stride * q->width;
            for (int at = 0; t < s->maps && at < s->tall * q->width; at += 16)
                __builtin_prefetch(next + at);
            for (int u = 0; u < q->order; u++) {
                const int *at = q->offsets + 2 * (t * q->order + u);
                in[u] = window + ((q->lifting ? 0 : u) * s->tall + at[0]) * s->wide + at[1];
            }
            for (int r = 0, pixel = 0; r < rows; r++)
                for (int i = 0, n; i < q->out_width; i += n, pixel += n) {
                    const long at = (long)r * q->stride * s->wide + i * q->stride;
                    float *o = to + pixel / PANEL * k * PANEL + pixel % PANEL;
                    n = MIN(PANEL - pixel % PANEL, q->out_width - i);
                    if (q->order == 4) analyse(4, 0, in, at, q->stride, o, step, n);
                    else if (q->stride == 1) analyse(8, 0, in, at, 1, o, step, n);
                    else analyse(8, 0, in, at, q->stride, o, step, n);
                }
        }
    }
}

/* The rows of a block and, from them on, a field's maps of an output. */
#define BLOCK_ROWS(at)                                                                             \
    const int image __attribute__((unused)) = (at) / s.blocks, row = (at) % s.blocks * s.rows;     \
    const int rows = MIN(q->out_height - row, s.rows), pixels = rows * q->out_width;               \
    const int panels __attribute__((unused)) = CEIL(pixels, PANEL);
#define FIELD_ROWS(type, name, y, image, field)                                                    \
    type *name[8];                                                                                 \
    for (int u = 0; u < q->order; u++)                                                             \
        name[u] = y + (((long)(image) * q->fields + (field)) * q->order + u) * s.pixels +          \
                  (long)row * q->out_width;

/* w (slabs, entries, tiles, SLAB * taps, TILE) from the weight; jobs of a tile and a channel. */
static void transform_filters(const Layer *q, const Plan *s, const float *weight, int job,
                              float *w) {
    const int o = job / q->channels * TILE, c = job % q->channels, tiles = CEIL(q->fields, TILE);
    const int slab = MIN(q->channels, SLAB);
    for (int t = 0; t < q->taps; t++) {
        float phi[8][TILE] = {{0}};
        for (int i = 0; i < MIN(TILE, q->fields - o); i++)
            for (int h = 0; h < q->order; h++)
                phi[h][i] = q->shares[t] * weight[(o + i) * q->next_field + c * q->next_channel +
                                                  q->cells[t * q->order + h]];
        for (int f = 0; f < s->entries; f++) {
            float sum[TILE] = {0};
            for (int h = 0; h < q->order; h++)
                for (int i = 0; i < TILE; i++) sum[i] += q->factors[f * q->order + h] * phi[h][i];
            long row = ((long)(c / slab * s->entries + f) * tiles + o / TILE) * slab * q->taps +
                       c % slab * q->taps + t;
            memcpy(w + row * TILE, sum, sizeof sum);
        }
    }
}

/* The rest of a block. Maps y (n, fields, order, height, width) are normalised, become max(0, .)
   and are blurred to half the size, (n, fields, order, (height + 1) / 2, (width + 1) / 2). */
typedef struct {
    int n, fields, order, height, width, threads;
    double eps;
    const float *gamma, *beta;
    const double *statistics; /* (2, fields): mean and variance; if NULL, y is normalised already */
} Maps;

/* Weights of the blur along one axis: output i has pixels 2*i - 1 + t, weights w[t * next + i]. */
static void blur_weights(int size, float *w, int next) {
    static const float windows[2][4] = {{1, 3, 3, 1}, {1, 2, 1, 0}};
    for (int i = 0; i < CEIL(size, 2); i++) {
        float total = 0;
        for (int t = 0; t < 4; t++) {
            const int pixel = 2 * i - 1 + t;
            total += w[t * next + i] = pixel < 0 || pixel >= size ? 0 : windows[size % 2][t];
        }
        for (int t = 0; t < 4; t++) w[t * next + i] /= total;
    }
}

/* The pooled maps of a field of one image; `down` are the weights along both axes, `lines` three
   lines of zeros at first. */
static void pool_field(const Maps *q, const float *y, float scale, float shift, const float *down,
                       float *lines, float *out) {
    const int width = q->width, half = CEIL(width, 2), tall = CEIL(q->height, 2);
    const long row = ROUND(width + 2, 16);
    float *sum = lines, *even = sum + row, *odd = even + row + 1;
    const float *w = down + 4 * tall;
    for (int line = 0; line < q->order * tall; line++) {
        const int i = line % tall, last = q->height - 1;
        const float *from = y + (long)(line / tall) * q->height * width;
        const float *y0 = from + (long)MAX(2 * i - 1, 0) * width;
        const float *y1 = from + (long)2 * i * width;
        const float *y2 = from + (long)MIN(2 * i + 1, last) * width;
        const float *y3 = from + (long)MIN(2 * i + 2, last) * width;
        const float w0 = down[i], w1 = down[tall + i], w2 = down[2 * tall + i];
        const float w3 = down[3 * tall + i];
        float *to = out + (long)line * half;
#define RELU(y) (scale * y[x] + shift < 0 ? 0 : scale * y[x] + shift)
#pragma omp simd
        for (int x = 0; x < width; x++)
            sum[x] = w0 * RELU(y0) + w1 * RELU(y1) + w2 * RELU(y2) + w3 * RELU(y3);
#pragma omp simd
        for (int x = 0; x < half; x++) even[x] = sum[2 * x], odd[x] = sum[2 * x + 1];
#pragma omp simd
        for (int x = 0; x < half; x++)
            to[x] = w[x] * odd[x - 1] + w[half + x] * even[x] + w[2 * half + x] * odd[x] +
                    w[3 * half + x] * even[x + 1];
    }
}

/* Rows of one image's maps y (fields, order, out_height, out_width), and of each field mean and sum
   of squared deviations in these rows, parts (fields, 2). */
static void convolve(const Layer *q, Plan s, const float *x, const float *w, const float *bias,
                     int job, float *window, float *p, float *z, float *y, double *parts) {
    const int slab = MIN(q->channels, SLAB), tiles = CEIL(q->fields, TILE), k = slab * q->taps;
    const long step = STEP((long)s.panels * k * PANEL), wstep = (long)tiles * k * TILE;
    const long zstep = STEP((long)s.panels * tiles * TILE * PANEL);
    BLOCK_ROWS(job)
    for (int c0 = 0; c0 < q->channels; c0 += slab) {
        const int width = MIN(q->channels - c0, slab), depth = width * q->taps;
        gather(q, &s, x, image, c0, width, row, rows, window, p, step, k);
        for (int f = 0; f < s.entries; f++)
            for (int j = 0; j < panels; j++)
                for (int o = 0; o < tiles; o++)
                    multiply(q->fields - o * TILE, depth,
                             w + (c0 / slab * s.entries + f) * wstep + (long)o * k * TILE,
                             p + f * step + place(0, j, k, s.panels),
                             z + f * zstep + place(o * TILE, j, TILE, s.panels), c0 > 0);
    }
    for (int o = 0; o < q->fields; o++) {
        FIELD_ROWS(float, out, y, 0, o)
        const float shift = bias ? bias[o] : 0, centre = shift + z[place(o, 0, TILE, s.panels)];
        vec sums[2] = {{0}};
        for (int j = 0; j < panels; j++) {
            float *from = z + place(o, j, TILE, s.panels);
            const int at = j * PANEL, n = MIN(PANEL, pixels - at);
            if (q->order == 8) synthesise(8, from, zstep, shift, centre, out, at, n, sums);
            else synthesise(4, from, zstep, shift, centre, out, at, n, sums);
        }
        double total[2] = {0}, count = (double)q->order * pixels;
        for (int i = 0; i < 2 * LANES; i++) total[i / LANES] += sums[i / LANES][i % LANES];
        parts[2 * o] = centre + total[0] / count;
        parts[2 * o + 1] = MAX(total[1] - total[0] * total[0] / count, 0);
    }
}

/* y (n, fields, order, out_height, out_width) from x (n, channels, order or none, height, width)
   and the weight. statistics (3, fields), if not NULL, gets each field's mean, variance and
   unbiased variance. With `pooled` instead of y, an image's maps stay in the cache of a processor,
   become max(0, .) and are blurred to half the size. */
int forward(const Layer *q, const float *x, const float *weight, const float *bias, float *y,
            double *statistics, float *pooled) {
    const Plan s = plan(q, BLOCK);
    const int threads = q->threads, slab = MIN(q->channels, SLAB), tiles = CEIL(q->fields, TILE);
    const int blocks = q->n * s.blocks, k = slab * q->taps;
    const long wstep = (long)tiles * k * TILE, of_field = q->order * s.pixels;
    const long psize = s.entries * STEP((long)s.panels * k * PANEL);
    const long zsize = s.entries * STEP((long)s.panels * tiles * TILE * PANEL);
    const Maps maps = {q->n, q->fields, q->order, q->out_height, q->out_width, threads};
    const int tall = CEIL(maps.height, 2), half = CEIL(maps.width, 2);
    const long lines = pooled ? 3 * ROUND(maps.width + 2, 16) : 0;
    const long own = pooled ? q->fields * of_field : 0;
    const long each = ROUND(s.window, 16) + ROUND(psize, 16) + ROUND(zsize, 16) + ROUND(own, 16);
    const long all = threads * (each + lines) + ROUND(4 * (tall + half), 16);
    float *memory = scratch(all + CEIL(q->channels, slab) * s.entries * wstep);
    float *down = memory + threads * (each + lines), *w = memory + all;
    double *parts = malloc(16L * (blocks + 1) * q->fields);
    if (!memory || !parts) return 1;
    blur_weights(maps.height, down, tall), blur_weights(maps.width, down + 4 * tall, half);
    Jobs jobs[threads];
    PARALLEL(tiles * q->channels)
    FOR_JOBS(job) transform_filters(q, &s, weight, job, w);
    PARALLEL(pooled ? q->n : blocks)
    {
        float *mine = memory + omp_get_thread_num() * (each + lines);
        float *window = take(&mine, s.window), *p = take(&mine, psize), *z = take(&mine, zsize);
        float *image = take(&mine, own);
        memset(window, 0, 4 * s.window), window += 16 - q->padding % 16;
        memset(mine, 0, 4 * lines);
        FOR_JOBS(job) {
            const int many = pooled ? s.blocks : 1;
            for (int at = job * many; at < (job + 1) * many; at++)
                convolve(q, s, x, w, bias, at, window, p, z,
                         pooled ? image : y + at / s.blocks * q->fields * of_field,
                         parts + 2L * at * q->fields);
            for (int o = 0; pooled && o < q->fields; o++)
                pool_field(&maps, image + o * of_field, 1, 0, down, mine,
                           pooled + ((long)job * q->fields + o) * q->order * tall * half);
        }
    }
    for (int o = 0; statistics && o < q->fields; o++) {
        double count = 0, mean = 0, squares = 0; /* of deviations; Chan, Golub and LeVeque (1983) */
        for (int job = 0; job < blocks; job++) {
            BLOCK_ROWS(job)
            const double *part = parts + 2 * ((long)job * q->fields + o), off = part[0] - mean;
            const double more = q->order * pixels, share = more / (count + more);
            mean += off * share, squares += part[1] + off * off * count * share, count += more;
        }
        statistics[o] = mean, statistics[q->fields + o] = squares / count;
        statistics[2 * q->fields + o] = squares / (count - 1);
    }
    free(memory), free(parts);
    return 0;
}

/* Zero the pixels of the last panel behind the block's last, in tiles of k rows. */
static void clear_tail(const Plan *s, int rows, int pixels, float *p, long step, int k) {
    const int used = pixels % PANEL;
    for (int f = 0; used && f < s->entries; f++)
        for (int r = 0; r < rows; r++)
            memset(p + f * step + place(r, pixels / PANEL, k, s->panels) + used, 0,
                   4 * (PANEL - used));
}

/* Add a tile (LEFT, RIGHT) of the transformed filters' gradient, summed over its parts, to that of
   the weight: rows from `row` up to `end`, fields from o. */
static void add_tile(const Layer *q, int entries, const float *tile, long next_entry, int parts,
                     long next_part, int row, int end, int o, float *dweight) {
    vec phi[8] = {{0}};
    for (int f = 0; f < entries; f++) {
        vec sum = {0};
        for (int part = 0; part < parts; part++)
            sum += *(const vec *)(tile + part * next_part + f * next_entry);
        for (int h = 0; h < q->order; h++) phi[h] += q->factors[f * q->order + h] * sum;
    }
    for (int i = 0; i < LANES; i++) {
        const int at = row + i / RIGHT, t = at % q->taps, field = o + i % RIGHT;
        if (at >= end || field >= q->fields) continue;
        float *to = dweight + field * q->next_field + at / q->taps * q->next_channel;
        for (int h = 0; h < q->order; h++)
            to[q->cells[t * q->order + h]] += q->shares[t] * phi[h][i];
    }
}

/* The weight's gradient from x and dy, by chunks of images. First dy is transformed, then each job
   correlates a slab of channels of some of the blocks, its part, with it. */
int weight_gradient(const Layer *q, const float *x, const float *dy, float *dweight) {
    const Plan s = plan(q, GRADIENT_BLOCK);
    const int threads = q->threads, slab = MIN(q->channels, GRADIENT_SLAB);
    const int slabs = CEIL(q->channels, slab), parts = CEIL(MAX(8, 2 * threads), slabs);
    const int lefts = CEIL(slab * q->taps, LEFT), rights = CEIL(q->fields, RIGHT);
    const int most = MIN(slab, GATHERED);
    const long step = STEP((long)s.panels * CEIL(most * q->taps, LEFT) * LEFT * PANEL);
    const long psize = s.entries * step;
    const long zstep = STEP((long)s.panels * rights * RIGHT * PANEL), zsize = s.entries * zstep;
    const long each = ROUND(s.window, 16) + ROUND(psize, 16), tiles = (long)lefts * rights;
    const long dsize = s.entries * tiles * LANES; /* of a slab: (entries, lefts, rights, LANES) */
    const int chunk = MAX((int)(SCRATCH / (4 * zsize * s.blocks)), CEIL(parts, s.blocks));
    float *memory = scratch(threads * each + chunk * s.blocks * zsize + parts * slabs * dsize);
    if (!memory) return 1;
    float *z = memory + threads * each, *dw = z + chunk * s.blocks * zsize;
    Jobs jobs[threads];
    PARALLEL(parts * slabs)
    FOR_JOBS(job) memset(dw + job * dsize, 0, 4 * dsize);
    for (int first = 0; first < q->n; first += chunk) {
        const int blocks = MIN(q->n - first, chunk) * s.blocks;
        PARALLEL(blocks)
        FOR_JOBS(job) {
            BLOCK_ROWS(job)
            for (int o = 0; o < q->fields; o++) {
                FIELD_ROWS(const float, in, dy, first + image, o)
                for (int j = 0; j < panels; j++) {
                    float *to = z + job * zsize + place(o, j, RIGHT, s.panels);
                    const int at = j * PANEL, n = MIN(PANEL, pixels - at);
                    if (q->order == 8) analyse(8, 1, in, at, 1, to, zstep, n);
                    else analyse(4, 1, in, at, 1, to, zstep, n);
                }
            }
            clear_tail(&s, rights * RIGHT, pixels, z + job * zsize, zstep, RIGHT);
        }
        PARALLEL(parts * slabs)
        {
            float *mine = memory + omp_get_thread_num() * each, *window = take(&mine, s.window);
            float *p = take(&mine, psize);
            memset(window, 0, 4 * s.window), window += 16 - q->padding % 16;
            FOR_JOBS(job) for (int at = job / slabs; at < blocks; at += parts) {
                BLOCK_ROWS(at)
                const int c0 = job % slabs * slab, end = MIN(c0 + slab, q->channels);
                for (int c = c0; c < end; c += most) {
                    const int width = MIN(most, end - c), l0 = (c - c0) * q->taps / LEFT;
                    const int ls = CEIL(width * q->taps, LEFT);
                    float *sums = dw + job * dsize + (long)l0 * rights * LANES;
                    const float *dz = z + at * zsize;
                    gather(q, &s, x, first + image, c, width, row, rows, window, p, step, LEFT);
                    clear_tail(&s, ls * LEFT, pixels, p, step, LEFT);
                    for (int f = 0; f < s.entries; f++)
                        for (int group = 0; group < ls; group += GROUP)
                            for (int r = 0; r < rights; r++)
                                for (int l = group; l < MIN(group + GROUP, ls); l++)
                                    correlate(
                                        panels, p + f * step + place(l * LEFT, 0, LEFT, s.panels),
                                        dz + f * zstep + place(r * RIGHT, 0, RIGHT, s.panels),
                                        sums + (f * tiles + l * rights + r) * LANES);
                }
            }
        }
    }
    memset(dweight, 0, 4L * q->fields * q->next_field);
    PARALLEL(slabs * lefts)
    FOR_JOBS(job) for (int r = 0; r < rights; r++) {
        const float *from = dw + job / lefts * dsize + (job % lefts * rights + r) * LANES;
        const int first_row = job / lefts * slab * q->taps + job % lefts * LEFT;
        const int end = MIN((job / lefts + 1) * slab, q->channels) * q->taps;
        add_tile(q, s.entries, from, tiles * LANES, parts, slabs * dsize, first_row, end, r * RIGHT,
                 dweight);
    }
    free(memory);
    return 0;
}

/* The norm of a field as scale * y + shift. */
static void affine(const Maps *q, int field, float *scale, float *shift) {
    *scale = 1, *shift = 0;
    if (!q->statistics) return;
    double factor = q->gamma[field] / sqrt(q->statistics[q->fields + field] + q->eps);
    *scale = factor, *shift = q->beta[field] - q->statistics[field] * factor;
}

/* The pooled maps, out. */
int pool(const Maps *q, const float *y, float *out) {
    const int threads = q->threads, tall = CEIL(q->height, 2), half = CEIL(q->width, 2);
    const long each = 3 * ROUND(q->width + 2, 16), plane = (long)q->height * q->width;
    float *memory = scratch(threads * each + 4 * (tall + half)), *down = memory + threads * each;
    if (!memory) return 1;
    blur_weights(q->height, down, tall), blur_weights(q->width, down + 4 * tall, half);
    Jobs jobs[threads];
    PARALLEL(q->n * q->fields)
    {
        float *lines = memory + omp_get_thread_num() * each;
        memset(lines, 0, 4 * each);
        FOR_JOBS(job) {
            float scale, shift;
            affine(q, job % q->fields, &scale, &shift);
            pool_field(q, y + job * q->order * plane, scale, shift, down, lines,
                       out + (long)job * q->order * tall * half);
        }
    }
    free(memory);
    return 0;
}

/* From the gradient of the pooled maps, dout, that of the normalised, dz. With dy NULL, sums of
   dz and of dz * (y - mean) give the gradients of gamma and beta, of_norm (2, fields), and the
   table (3, fields) of a, b and c in the gradient of y, dy = a * dz + b * (y - mean) + c. With dy,
   which may be of a part of the images, this is written; without statistics it is dz. */
int pool_gradient(const Maps *q, const float *y, const float *dout, double *table, float *of_norm,
                  float *dy) {
    const int threads = q->threads, width = q->width, half = CEIL(width, 2), fields = q->fields;
    const int tall = CEIL(q->height, 2), next = half + 2, row = 2 * half;
    const long size = (long)tall * next, wide_size = (long)(tall + 2) * row;
    const long each = ROUND(size, 16) + ROUND(wide_size, 16) + 2 * ROUND(width, 16);
    float *memory = scratch(threads * each + 4 * (tall + next)), *down = memory + threads * each;
    double *sums = calloc(2L * q->n * fields + 1, 8);
    if (!memory || !sums) return 1;
    float *const across = down + 4 * tall + 1; /* with a zero on either side */
    memset(down, 0, 16 * (tall + next));
    blur_weights(q->height, down, tall), blur_weights(width, across, next);
    Jobs jobs[threads];
    PARALLEL(q->n * fields) {
        float *mine = memory + omp_get_thread_num() * each; /* all zero, for the borders */
        memset(mine, 0, 4 * each);
        float *in = take(&mine, size) + 1, *wide = take(&mine, wide_size) + row;
        float *ones = take(&mine, width), *products = take(&mine, width);
        FOR_JOBS(job) for (int u = 0; u < q->order; u++) {
            const int o = job % fields, exact = !q->statistics || !dy;
            const float mean = q->statistics ? q->statistics[o] : 0, a = exact ? 1 : table[o];
            const float b = exact ? 0 : table[fields + o], c = exact ? 0 : table[2 * fields + o];
            const float *from = dout + ((long)job * q->order + u) * tall * half, *w = across;
            const long at = ((long)job * q->order + u) * q->height * width;
            const float *values = y + at;
            float *to = dy + at, scale, shift;
            affine(q, o, &scale, &shift);
            for (int i = 0; i < tall; i++) memcpy(in + i * next, from + (long)i * half, 4 * half);
            for (int i = 0; i < tall; i++) { /* at full width */
                const float *d = in + i * next;
                float *rows = wide + i * row;
#pragma omp simd
                for (int x = 0; x < half; x++) {
                    rows[2 * x] = w[next + x] * d[x] + w[3 * next + x - 1] * d[x - 1];
                    rows[2 * x + 1] = w[2 * next + x] * d[x] + w[x + 1] * d[x + 1];
                }
            }
            for (int r = 0; r < q->height; r++, values += width, to += width) {
                /* the pooled rows i and i - 1 have taps t and t + 2 here */
                const int i = (r + 1) / 2, t = r - 2 * i + 1;
                const float *d1 = wide + (long)i * row, *d0 = d1 - row;
                const float w1 = i < tall ? down[t * tall + i] : 0;
                const float w0 = i ? down[(t + 2) * tall + i - 1] : 0;
#define DZ(x) (scale * values[x] + shift > 0 ? w0 * d0[x] + w1 * d1[x] : 0)
                if (dy) {
#pragma omp simd
                    for (int x = 0; x < width; x++)
                        to[x] = a * DZ(x) + (b * (values[x] - mean) + c);
                } else {
#pragma omp simd
                    for (int x = 0; x < width; x++) {
                        const float dz = DZ(x);
                        ones[x] += dz, products[x] += dz * (values[x] - mean);
                    }
                }
            }
            for (int x = 0; !dy && x < width; x++) {
                sums[2 * job] += ones[x], sums[2 * job + 1] += products[x];
                ones[x] = products[x] = 0;
            }
        }
    }
    for (int o = 0; !dy && o < fields; o++) {
        const double count = (double)q->n * q->order * q->height * width;
        const double inverse = 1 / sqrt(q->statistics[fields + o] + q->eps);
        double one = 0, product = 0;
        for (int job = o; job < q->n * fields; job += fields)
            one += sums[2 * job], product += sums[2 * job + 1];
        of_norm[o] = inverse * product, of_norm[fields + o] = one;
        table[o] = q->gamma[o] * inverse;
        table[fields + o] = -table[o] * inverse * inverse * product / count;
        table[2 * fields + o] = -table[o] * one / count;
    }
    free(memory), free(sums);
    return 0;
}
