/* Fourier group convolution on a CPU: the fused float32 kernels behind lib/gfourier.py, which explains the method and its symbols.

   Each thread always takes the same run of neighbouring blocks: what it writes is then beside what it wrote, in this call and the last, and
   not in another core's cache.

   A block is a few rows of output pixels. For each block the patches P of a slab of channels are gathered and transformed into a buffer that
   stays in the cache, multiplied by the transformed filters, and the result is transformed back: the patch tensor is never in memory as a
   whole. Arrays are contiguous float32; `mb` is the number of pixels of a block, `ld` the same rounded up to whole vectors. */

#include <stdlib.h>
#include <string.h>

int omp_get_thread_num(void); /* of the OpenMP that PyTorch has loaded; its header need not be there */

#if defined(__AVX512F__)
#define LANES 16
#define TILE 8
#elif defined(__AVX2__)
#define LANES 8
#define TILE 4
#else
#define LANES 4
#define TILE 4
#endif
#define ROUND(n) (((n) + LANES - 1) / LANES * LANES)
#define STEP(n) ((n) | LANES) /* likewise odd: for multiples of LANES */
#define WHOLE(n) (((n) + 15) / 16 * 16) /* whole lines of the cache */
#define BLOCK 256            /* pixels of a block, about */
#define SLAB 8               /* channels of a slab, at most */
#define SCRATCH (16L << 20)  /* bytes of transformed gradients held at a time, about */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Mirrored by lib/gkernel.py. */
typedef struct {
    int order, lifting, n, channels, fields, taps, height, width, out_height, out_width, stride, padding, kernel_size, threads, parts;
    const int *offsets; /* (taps, order, 2): row and column of A(u) t, counted from the corner of the window */
} Layer;

/* c (m, n) += a (m, k) b (k, n), n a multiple of LANES, a[i, l] at i * row + l * next: tiles of c stay in registers. */
#define GEMM_TILE(M, V)                                                                    \
    do {                                                                                   \
        vec acc[M][V];                                                                     \
        for (int r = 0; r < M; r++)                                                        \
            for (int v = 0; v < V; v++) acc[r][v] = *(vec *)(c + (i + r) * ldc + j + v * LANES); \
        for (int l = 0; l < k; l++)                                                        \
            for (int v = 0; v < V; v++) {                                                  \
                vec column = *(const vec *)(b + l * ldb + j + v * LANES);                  \
                for (int r = 0; r < M; r++) acc[r][v] += a[(i + r) * row + l * next] * column;    \
            }                                                                              \
        for (int r = 0; r < M; r++)                                                        \
            for (int v = 0; v < V; v++) *(vec *)(c + (i + r) * ldc + j + v * LANES) = acc[r][v]; \
    } while (0)

static void gemm(int m, int n, int k, const float *restrict a, long row, long next, const float *restrict b, long ldb, float *restrict c, long ldc) {
#define GEMM_ROWS(M)                                             \
    for (; i + M <= m; i += M) {                                 \
        int j = 0;                                               \
        for (; j + 2 * LANES <= n; j += 2 * LANES) GEMM_TILE(M, 2); \
        for (; j < n; j += LANES) GEMM_TILE(M, 1);               \
    }
    int i = 0;
    GEMM_ROWS(TILE)
    GEMM_ROWS(2)
    GEMM_ROWS(1)
}

/* Scratch memory for all threads, of whole lines, and the next array from it. The calling thread gets it: the memory that another thread
   gets for itself is given back to the system at the end of each call. */
static float *scratch(long floats) { return aligned_alloc(64, 4 * floats); }

static float *take(float **memory, long floats) {
    float *array = *memory;
    *memory += WHOLE(floats);
    return array;
}

/* The four butterflies of a group, for rows of n pixels: x[u][pixel * stride] holds element u, e[f * step + pixel] entry f of the transform.
   lib/gfourier.py derives them; `D` and `E` stand for the sums of x under the rotations and under the mirrored ones that the irrep of
   dimension 2 sees. ANALYSIS makes s0, s1, D0, D1 (and t0, t1, E0, E1) from x; SYNTHESIS is its transpose. */
#define INLINE static inline __attribute__((always_inline))
#define ANALYSIS                                                                                                                   \
    long i = (long)pixel * stride;                                                                                                 \
    float s0 = x[0][i] + x[2][i], D0 = x[0][i] - x[2][i], s1 = x[1][i] + x[3][i], D1 = x[1][i] - x[3][i], *o = e + pixel;            \
    o[0] = s0 + s1, o[step] = s0 - s1;                                                                                             \
    if (order == 8) {                                                                                                              \
        float t0 = x[4][i] + x[6][i], t1 = x[5][i] + x[7][i];                                                                      \
        o[0] = s0 + s1 + (t0 + t1), o[step] = s0 + s1 - (t0 + t1), o[2 * step] = s0 - s1 + (t0 - t1), o[3 * step] = s0 - s1 - (t0 - t1); \
    }
#define SYNTHESIS(D0, D1, E0, E1)                                                                                                  \
    if (order == 8) {                                                                                                              \
        float a = o[0] + o[step], b = o[0] - o[step], c = o[2 * step] + o[3 * step], d = o[2 * step] - o[3 * step];                 \
        float d0 = D0, d1 = D1, e0 = E0, e1 = E1;                                                                                  \
        PUT(0, a + c + d0), PUT(1, a - c + d1), PUT(2, a + c - d0), PUT(3, a - c - d1);                                            \
        PUT(4, b + d + e0), PUT(5, b - d + e1), PUT(6, b + d - e0), PUT(7, b - d - e1);                                            \
    }

/* Entries of the patches. */
INLINE void analyse_x(int order, const float *const *x, long stride, float *restrict e, long step, int n) {
    for (int pixel = 0; pixel < n; pixel++) {
        ANALYSIS
        if (order == 4) {
            o[2 * step] = D0 - D1, o[3 * step] = D0, o[4 * step] = D1;
        } else {
            float E0 = x[4][i] - x[6][i], E1 = x[5][i] - x[7][i], p00 = D0 - E0, p01 = E1 - D1, p10 = D1 + E1, p11 = D0 + E0;
            o[4 * step] = D0, o[5 * step] = p10 + p11, o[6 * step] = p00, o[7 * step] = p11;
            o[8 * step] = p00 + p01, o[9 * step] = p10 - p00, o[10 * step] = p01 - p11;
        }
    }
}

/* Entries of the output's gradient. */
INLINE void analyse_dy(int order, const float *const *x, float *restrict e, long step, int n) {
    const long stride = 1;
    for (int pixel = 0; pixel < n; pixel++) {
        ANALYSIS
        if (order == 4) {
            o[2 * step] = D0 - D1, o[3 * step] = -D1, o[4 * step] = D0;
        } else {
            float E0 = x[4][i] - x[6][i], E1 = x[5][i] - x[7][i], y00 = D0 - E0, y01 = E1 - D1, y10 = D1 + E1, y11 = D0 + E0;
            o[4 * step] = 2 * D0, o[5 * step] = y10 - y11, o[6 * step] = y01 + y11, o[7 * step] = y00 + y10;
            o[8 * step] = y01 - y00, o[9 * step] = y11, o[10 * step] = y00;
        }
    }
}

/* The output, from its entries. */
INLINE void synthesise_y(int order, const float *restrict e, long step, float *const *x, int n, float bias) {
#define PUT(u, value) (x[u][pixel] = bias + (value))
#pragma GCC ivdep
    for (int pixel = 0; pixel < n; pixel++) {
        const float *o = e + pixel;
        if (order == 4) {
            float even = o[0] + o[step], odd = o[0] - o[step], d0 = o[2 * step] + o[4 * step], d1 = -o[2 * step] - o[3 * step];
            PUT(0, even + d0), PUT(1, odd + d1), PUT(2, even - d0), PUT(3, odd - d1);
        } else {
            float m4 = o[4 * step], m5 = o[5 * step], m6 = o[6 * step], m7 = o[7 * step], m8 = o[8 * step];
            float y00 = m4 + m7 - m8 + o[10 * step], y01 = m6 + m8, y10 = m5 + m7, y11 = m4 - m5 + m6 + o[9 * step];
            SYNTHESIS(y00 + y11, y10 - y01, y11 - y00, y01 + y10)
        }
    }
#undef PUT
}

/* The input's gradient, from the entries of the patches' gradient, added. */
INLINE void synthesise_dx(int order, const float *restrict e, long step, float *const *x, long stride, int n) {
#define PUT(u, value) (x[u][i] += (value))
#pragma GCC ivdep
    for (int pixel = 0; pixel < n; pixel++) {
        const float *o = e + pixel;
        long i = (long)pixel * stride;
        if (order == 4) {
            float even = o[0] + o[step], odd = o[0] - o[step], d0 = o[2 * step] + o[3 * step], d1 = o[4 * step] - o[2 * step];
            PUT(0, even + d0), PUT(1, odd + d1), PUT(2, even - d0), PUT(3, odd - d1);
        } else {
            float m5 = o[5 * step], m8 = o[8 * step], m9 = o[9 * step], m10 = o[10 * step];
            float p00 = o[6 * step] + m8 - m9, p01 = m8 + m10, p10 = m5 + m9, p11 = m5 + o[7 * step] - m10;
            SYNTHESIS(p00 + p11 + o[4 * step], p10 - p01, p11 - p00, p01 + p10)
        }
    }
#undef PUT
}

/* One channel's rows under the output rows from `row`, with the border of zeros: pad (maps, rows, width + 2 padding). */
static void load_window(const Layer *q, const float *x, int row, int rows, float *pad) {
    int maps = q->lifting ? 1 : q->order, tall = (rows - 1) * q->stride + q->kernel_size, wide = q->width + 2 * q->padding;
    for (int u = 0; u < maps; u++)
        for (int r = 0; r < tall; r++) {
            int source = row * q->stride + r - q->padding;
            float *to = pad + ((long)u * tall + r) * wide;
            if (source < 0 || source >= q->height) {
                memset(to, 0, 4 * wide);
                continue;
            }
            memset(to, 0, 4 * q->padding);
            memcpy(to + q->padding, x + ((long)u * q->height + source) * q->width, 4 * q->width);
            memset(to + q->padding + q->width, 0, 4 * q->padding);
        }
}

/* Transformed patches of one channel: out[f * step + t * ld + pixel]. */
static void gather(const Layer *q, const float *pad, int rows, float *out, long step, int ld) {
    int tall = (rows - 1) * q->stride + q->kernel_size, wide = q->width + 2 * q->padding;
    for (int t = 0; t < q->taps; t++)
        for (int r = 0; r < rows; r++) {
            const float *in[8];
            for (int u = 0; u < q->order; u++) {
                const int *at = q->offsets + 2 * (t * q->order + u);
                in[u] = pad + ((long)(q->lifting ? 0 : u) * tall + r * q->stride + at[0]) * wide + at[1];
            }
            float *to = out + (long)t * ld + (long)r * q->out_width;
            if (q->order == 8 && q->stride == 1) analyse_x(8, in, 1, to, step, q->out_width);
            else if (q->order == 8) analyse_x(8, in, q->stride, to, step, q->out_width);
            else analyse_x(4, in, q->stride, to, step, q->out_width);
        }
}

/* The transpose of `gather`, added into one channel's padded image of `tall` rows. */
static void scatter(const Layer *q, const float *in, long step, int ld, int row, int rows, float *pad, int tall) {
    int wide = q->width + 2 * q->padding;
    for (int t = 0; t < q->taps; t++)
        for (int r = 0; r < rows; r++) {
            float *out[8];
            for (int u = 0; u < q->order; u++) {
                const int *at = q->offsets + 2 * (t * q->order + u);
                out[u] = pad + ((long)(q->lifting ? 0 : u) * tall + (row + r) * q->stride + at[0]) * wide + at[1];
            }
            const float *from = in + (long)t * ld + (long)r * q->out_width;
            if (q->lifting) { /* the rows overlap, being the same map's: one pixel at a time */
                for (int pixel = 0; pixel < q->out_width; pixel++) {
                    float value[8] = {0}, *one[8];
                    for (int u = 0; u < q->order; u++) one[u] = value + u;
                    if (q->order == 8) synthesise_dx(8, from + pixel, step, one, 1, 1);
                    else synthesise_dx(4, from + pixel, step, one, 1, 1);
                    for (int u = 0; u < q->order; u++) out[u][pixel * q->stride] += value[u];
                }
            } else if (q->order == 8 && q->stride == 1) synthesise_dx(8, from, step, out, 1, q->out_width);
            else if (q->order == 8) synthesise_dx(8, from, step, out, q->stride, q->out_width);
            else synthesise_dx(4, from, step, out, q->stride, q->out_width);
        }
}

/* How a layer's output is cut: blocks of `rows` rows, each stored with `ld` floats a channel; channels in slabs. */
typedef struct {
    int maps, rows, count, ld, entries;
    long k, pixels, plane;
} Plan;

static Plan plan(const Layer *q) {
    Plan s;
    s.maps = q->lifting ? 1 : q->order;
    s.rows = MIN(MAX(BLOCK / q->out_width, 1), q->out_height);
    s.count = (q->out_height + s.rows - 1) / s.rows;
    s.ld = ROUND(s.rows * q->out_width) | LANES; /* odd in vectors, so that rows fall into different sets of the cache */
    s.entries = q->order == 8 ? 11 : 5;
    s.k = (long)q->channels * q->taps, s.pixels = (long)q->out_height * q->out_width, s.plane = (long)q->height * q->width;
    return s;
}

static int slab_width(const Layer *q, int parallel) { return MIN(MAX(q->channels / parallel, 1), SLAB); }

/* Transformed patches of `width` channels of one image from channel c0: p (order, slab * taps, ld), with `step` floats an irrep's entry. */
static void gather_slab(const Layer *q, const Plan *s, const float *x, int image, int c0, int width, int row, int rows, float *pad, float *p, long step) {
    for (int c = 0; c < width; c++) {
        load_window(q, x + ((long)image * q->channels + c0 + c) * s->maps * s->plane, row, rows, pad);
        gather(q, pad, rows, p + (long)c * q->taps * s->ld, step, s->ld);
    }
}

/* y (n, fields, order, out_height, out_width) from x (n, channels, order or none, height, width), w (entries, channels * taps, fields). */
int forward(const Layer *q, const float *x, const float *w, const float *bias, float *y) {
    const Plan s = plan(q);
    int slab = slab_width(q, 1);
    long step = STEP((long)slab * q->taps * s.ld), ystep = STEP((long)q->fields * s.ld);
    long psize = s.entries * step, zsize = s.entries * ystep, padded = (long)s.maps * ((s.rows - 1) * q->stride + q->kernel_size) * (q->width + 2 * q->padding);
    float *memory = scratch(q->threads * (WHOLE(padded) + WHOLE(psize) + WHOLE(zsize)));
    if (!memory) return 1;
#pragma omp parallel num_threads(q->threads)
    {
        float *mine = memory + omp_get_thread_num() * (WHOLE(padded) + WHOLE(psize) + WHOLE(zsize));
        float *pad = take(&mine, padded), *p = take(&mine, psize), *z = take(&mine, zsize);
#pragma omp for schedule(static)
        for (int job = 0; job < q->n * s.count; job++) {
            int image = job / s.count, row = job % s.count * s.rows, rows = MIN(q->out_height - row, s.rows), mb = rows * q->out_width;
            memset(z, 0, 4 * s.entries * ystep);
            for (int c0 = 0; c0 < q->channels; c0 += slab) {
                int width = MIN(q->channels - c0, slab);
                gather_slab(q, &s, x, image, c0, width, row, rows, pad, p, step);
                for (int o = 0; o < q->fields; o += TILE)
                    for (int f = 0; f < s.entries; f++)
                        gemm(MIN(q->fields - o, TILE), ROUND(mb), width * q->taps, w + (f * s.k + (long)c0 * q->taps) * q->fields + o, 1, q->fields,
                             p + f * step, s.ld, z + f * ystep + (long)o * s.ld, s.ld);
            }
            for (int o = 0; o < q->fields; o++) {
                float *out[8];
                for (int u = 0; u < q->order; u++) out[u] = y + (((long)image * q->fields + o) * q->order + u) * s.pixels + (long)row * q->out_width;
                if (q->order == 8) synthesise_y(8, z + (long)o * s.ld, ystep, out, mb, bias ? bias[o] : 0);
                else synthesise_y(4, z + (long)o * s.ld, ystep, out, mb, bias ? bias[o] : 0);
            }
        }
    }
    free(memory);
    return 0;
}

/* Gradients from dy, shaped like y: dx like x if not NULL; dw (parts, entries, channels * taps, fields rounded up to LANES) added to if not NULL.
   w as for `forward`. */
int backward(const Layer *q, const float *x, const float *w, const float *dy, float *dx, float *dw) {
    if (!q->n) return 0;
    const Plan s = plan(q);
    int wide = q->width + 2 * q->padding, fields = ROUND(q->fields);
    int tall = MAX((q->out_height - 1) * q->stride + q->kernel_size, q->height + 2 * q->padding);
    long padded = (long)s.maps * tall * wide, ystep = STEP((long)q->fields * s.ld), zsize = s.entries * ystep, tstep = STEP((long)s.ld * fields), tsize = s.entries * tstep;
    int chunk = MIN(MAX((int)(SCRATCH / (4 * zsize * s.count)), q->threads), q->n);
    int slab = slab_width(q, MAX(q->threads / chunk, 1)), slabs = (q->channels + slab - 1) / slab;
    int slab_w = slab_width(q, MAX(q->threads / q->parts, 1)), slabs_w = (q->channels + slab_w - 1) / slab_w;
    long step = STEP((long)slab * q->taps * s.ld), step_w = STEP((long)slab_w * q->taps * s.ld);
    /* The transformed gradient, z (image, block, order, fields, ld), and its transpose, zt (image, block, order, ld, fields). */
    long zall = dx ? zsize * chunk * s.count : 0, ztall = dw ? tsize * chunk * s.count : 0, psize = s.entries * MAX(step, step_w);
    long each = WHOLE(zsize) + WHOLE(padded * slab) + WHOLE(psize);
    float *memory = scratch(q->threads * each + WHOLE(zall) + WHOLE(ztall)), *rest = memory;
    if (!memory) return 1;
    float *own = take(&rest, q->threads * each), *z = dx ? take(&rest, zall) : NULL, *zt = dw ? take(&rest, ztall) : NULL;
#pragma omp parallel num_threads(q->threads)
    {
        float *mine = own + omp_get_thread_num() * each;
        float *local = take(&mine, zsize), *pad = take(&mine, padded * slab), *p = take(&mine, psize);
        for (int first = 0; first < q->n; first += chunk) {
            int images = MIN(q->n - first, chunk);
#pragma omp for schedule(static)
            for (int job = 0; job < images * s.count; job++) {
                int image = first + job / s.count, row = job % s.count * s.rows, mb = MIN(q->out_height - row, s.rows) * q->out_width;
                float *to = z ? z + job * zsize : local;
                for (int o = 0; o < q->fields; o++) {
                    const float *in[8];
                    for (int u = 0; u < q->order; u++) in[u] = dy + (((long)image * q->fields + o) * q->order + u) * s.pixels + (long)row * q->out_width;
                    if (q->order == 8) analyse_dy(8, in, to + (long)o * s.ld, ystep, mb);
                    else analyse_dy(4, in, to + (long)o * s.ld, ystep, mb);
                    for (int f = 0; f < s.entries; f++)
                        for (int pixel = mb; pixel < s.ld; pixel++) to[f * ystep + (long)o * s.ld + pixel] = 0;
                }
                for (int f = 0; zt && f < s.entries; f++)
                    for (int start = 0; start < mb; start += 16)
                        for (int o = 0; o < fields; o++)
                            for (int pixel = start; pixel < MIN(start + 16, mb); pixel++)
                                zt[job * tsize + f * tstep + (long)pixel * fields + o] = o < q->fields ? to[f * ystep + (long)o * s.ld + pixel] : 0;
            }
#pragma omp for schedule(static)
            for (int job = 0; job < (dx ? images * slabs : 0); job++) {
                int image = first + job / slabs, c0 = job % slabs * slab, width = MIN(q->channels - c0, slab), rows;
                memset(pad, 0, 4 * padded * width);
                for (int block = 0, row = 0; row < q->out_height; block++, row += rows) {
                    const float *from = z + (job / slabs * (long)s.count + block) * zsize;
                    rows = MIN(q->out_height - row, s.rows);
                    memset(p, 0, 4 * s.entries * step);
                    for (int f = 0; f < s.entries; f++)
                        gemm(width * q->taps, ROUND(rows * q->out_width), q->fields, w + (f * s.k + (long)c0 * q->taps) * q->fields, q->fields, 1,
                             from + f * ystep, s.ld, p + f * step, s.ld);
                    for (int c = 0; c < width; c++) scatter(q, p + (long)c * q->taps * s.ld, step, s.ld, row, rows, pad + c * padded, tall);
                }
                for (int c = 0; c < width; c++)
                    for (int u = 0; u < s.maps; u++)
                        for (int r = 0; r < q->height; r++)
                            memcpy(dx + (((long)image * q->channels + c0 + c) * s.maps + u) * s.plane + (long)r * q->width,
                                   pad + c * padded + ((long)u * tall + r + q->padding) * wide + q->padding, 4 * q->width);
            }
#pragma omp for schedule(static)
            for (int job = 0; job < (dw ? q->parts * slabs_w : 0); job++) {
                int part = job / slabs_w, c0 = job % slabs_w * slab_w, width = MIN(q->channels - c0, slab_w);
                for (int at = part; at < images * s.count; at += q->parts) {
                    int row = at % s.count * s.rows, rows = MIN(q->out_height - row, s.rows);
                    gather_slab(q, &s, x, first + at / s.count, c0, width, row, rows, pad, p, step_w);
                    for (int f = 0; f < s.entries; f++)
                        gemm(width * q->taps, fields, rows * q->out_width, p + f * step_w, s.ld, 1, zt + at * tsize + f * tstep, fields,
                             dw + (((long)part * s.entries + f) * s.k + (long)c0 * q->taps) * fields, fields);
                }
            }
        }
    }
    free(memory);
    return 0;
}

int lanes(void) { return LANES; }
