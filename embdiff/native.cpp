// A step of sampling on a CPU with AVX512-VNNI and AVX512-BF16: the denoiser's pass, the token posterior, and the best
// text of a chain. `embdiff/native.py` builds this file and says what its arguments are.
//
//     R rows: positions of all texts, one after the other    W width    N outputs    D embedding dim    V vocabulary
//
// Everything rests on one product, `tile`: up to 6 rows of activations by 64 outputs, in 24 registers. An activation is
// a row of 32-bit words, each of which holds 4 numbers of 8 bits or 2 of bf16; weights lie in panels of 64 outputs, in
// the order in which `tile` reads them: word 0 of all 64, word 1 of all 64, ... What is done to a product's results is
// done while they are in registers. All threads go through the layers together and meet after each part.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace {

#define INLINE inline __attribute__((always_inline))

using Bf16 = uint16_t;
using Index = int64_t;
using Vector = __m512;

constexpr Index LANES = 16, PANEL = 64, ROWS = 6;
constexpr Index BLOCK = 256;       // words of the vocabulary that are held at a time
constexpr Index AT_ONCE = 2048;    // rows that go through the layers together, or one text
constexpr Index ROW_BLOCK = 96;    // rows that one thread multiplies by a panel
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NEVER = -1e30f;    // a logarithm of next to nothing, with which one can still count

// ---------------------------------------------------------------------------------------------------- memory

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Memory that grows and is kept: what is mapped anew has to be filled in by the system page by page.
template <class T>
class Space {
public:
    T* of(Index count) {
        if (count > size_) {
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
            size_ = memory_ ? count : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

private:
    std::unique_ptr<T, Free> memory_;
    Index size_ = 0;
};

// ------------------------------------------------------------------------------------------------- 16 numbers

INLINE Vector all(float x) { return _mm512_set1_ps(x); }
INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vector load(const Bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
INLINE void store(Bf16* p, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// 2^x for x <= 0: whole powers apart, the rest by its series up to x^5, off by 2e-6 at most.
INLINE Vector exp2(Vector x) {
    x = _mm512_max_ps(x, all(-126.0f));
    const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector part = _mm512_sub_ps(x, whole);
    Vector y = all(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) y = _mm512_fmadd_ps(y, part, all(c));
    return _mm512_scalef_ps(y, whole);
}
INLINE float exp2(float x) { return std::exp2(std::max(x, -126.0f)); }

// ----------------------------------------------------------------------------------------------- the product

// Activations as `tile` takes them, with what becomes of sums of 8-bit numbers: (sum - shift) * scale.
struct Packed {
    uint32_t* words;
    Index stride;
    float* scale;
    int32_t* shift;
};

struct Weight {
    const uint8_t* panels;  // [N / 64, K / (4 or 2), 64, 4 or 2]
    const float* scale;     // [N] of 8-bit numbers, else null
    Index steps;            // words of a row
    Index outputs;          // N, a multiple of 16; panels go on to a multiple of 64
};

// Numbers of 8 bits: activations signed, weights with 128 added, which is what the instruction multiplies.
struct Bytes {
    using Sum = __m512i;
    static constexpr Index IN_WORD = 4;
    static INLINE Sum zero() { return _mm512_setzero_si512(); }
    static INLINE Sum add(Sum sum, __m512i weights, __m512i activation) {
        return _mm512_dpbusd_epi32(sum, weights, activation);
    }
    static INLINE Vector value(Sum sum, const Packed& rows, Index row, const Weight& weight, Index column) {
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(rows.shift[row]));
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), all(rows.scale[row])), load(weight.scale + column));
    }
    // Row `row` of the packed ones from n numbers, in steps of 1/127 of the largest.
    template <class Load>
    static INLINE void pack(const Packed& to, Index row, Index n, Load from) {
        Vector largest = _mm512_setzero_ps();
        for (Index i = 0; i < n; i += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(from(i)));
        const float step = std::max(_mm512_reduce_max_ps(largest), 1e-30f) / 127;
        const Vector inverse = all(1 / step);
        auto* bytes = reinterpret_cast<int8_t*>(to.words + row * to.stride);
        __m512i sum = _mm512_setzero_si512();
        for (Index i = 0; i < n; i += LANES) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(from(i), inverse));
            sum = _mm512_add_epi32(sum, rounded);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtsepi32_epi8(rounded));
        }
        to.scale[row] = step;
        to.shift[row] = 128 * _mm512_reduce_add_epi32(sum);
    }
};

struct Halves {
    using Sum = Vector;
    static constexpr Index IN_WORD = 2;
    static INLINE Sum zero() { return _mm512_setzero_ps(); }
    static INLINE Sum add(Sum sum, __m512i weights, __m512i activation) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(activation));
    }
    static INLINE Vector value(Sum sum, const Packed&, Index, const Weight&, Index) { return sum; }
    template <class Load>
    static INLINE void pack(const Packed& to, Index row, Index n, Load from) {
        auto* halves = reinterpret_cast<Bf16*>(to.words + row * to.stride);
        for (Index i = 0; i < n; i += LANES) store(halves + i, from(i));
    }
};

// sums [M, 64] of rows [M, steps words] by a panel. A function of its own, in which all sums stay in registers.
template <class T, int M>
__attribute__((noinline)) void tile(
    const uint32_t* rows, Index stride, const uint8_t* panel, Index steps, typename T::Sum* sums
) {
    typename T::Sum sum[M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[m][j] = T::zero();
    for (Index k = 0; k < steps; ++k, panel += 256) {
        __m512i weights[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) weights[j] = _mm512_loadu_si512(panel + 64 * j);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m512i activation = _mm512_set1_epi32(static_cast<int>(rows[m * stride + k]));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[m][j] = T::add(sum[m][j], weights[j], activation);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[4 * m + j] = sum[m][j];
}

// Calls use(std::integral_constant<int, M>, first row) for rows [from, to), by as many as fit.
template <class Use>
INLINE void by_tiles(Index from, Index to, Use use) {
    for (; from + ROWS <= to; from += ROWS) use(std::integral_constant<int, ROWS>(), from);
    switch (to - from) {
        case 1: return use(std::integral_constant<int, 1>(), from);
        case 2: return use(std::integral_constant<int, 2>(), from);
        case 3: return use(std::integral_constant<int, 3>(), from);
        case 4: return use(std::integral_constant<int, 4>(), from);
        case 5: return use(std::integral_constant<int, 5>(), from);
        default: return;
    }
}

// Rows [R] by all outputs of a weight, shared by the threads; use(row, column, 16 numbers) takes the results.
template <class T, class Use>
void product(const Packed& rows, Index R, const Weight& weight, Use use) {
    const Index panels = (weight.outputs + PANEL - 1) / PANEL, wanted = 3 * omp_get_num_threads();
    Index parts = std::max<Index>((R + ROW_BLOCK - 1) / ROW_BLOCK, (wanted + panels - 1) / panels);
    const Index block = ((R + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    parts = (R + block - 1) / block;
#pragma omp for schedule(dynamic) collapse(2)
    for (Index panel = 0; panel < panels; ++panel) {
        for (Index part = 0; part < parts; ++part) {
            const uint8_t* weights = weight.panels + panel * weight.steps * 256;
            by_tiles(part * block, std::min(R, (part + 1) * block), [&](auto count, Index row) {
                constexpr int M = decltype(count)::value;
                typename T::Sum sums[4 * M];
                tile<T, M>(rows.words + row * rows.stride, rows.stride, weights, weight.steps, sums);
                for (int m = 0; m < M; ++m)
                    for (int j = 0; j < 4; ++j) {
                        const Index column = panel * PANEL + j * LANES;
                        if (column < weight.outputs) use(row + m, column, T::value(sums[4 * m + j], rows, row + m, weight, column));
                    }
            });
        }
    }
}

// ----------------------------------------------------------------------------------------------- the denoiser

template <class Number>
INLINE float over_root_mean_square(const Number* x, Index n) {
    Vector sum = _mm512_setzero_ps();
    for (Index i = 0; i < n; i += LANES) sum = _mm512_fmadd_ps(load(x + i), load(x + i), sum);
    return 1 / std::sqrt(_mm512_reduce_add_ps(sum) / n + 1e-6f);
}

// x over its root mean square, times 1 + scale, plus shift, as something to load from.
INLINE auto modulated(const float* x, Index n, const float* shift, const float* scale) {
    const Vector norm = all(over_root_mean_square(x, n));
    return [=](Index i) {
        const Vector y = _mm512_mul_ps(load(x + i), norm);
        return _mm512_fmadd_ps(y, load(scale + i), _mm512_add_ps(y, load(shift + i)));
    };
}

}  // namespace

extern "C" {

// The denoiser's weights: embed [2 D -> W] of z beside the last x0, then of each layer qkv, out, up and down.
struct Network {
    Index width, heads, depth, dim, bytes, threads;
    const Weight* weights;
};

// What one pass is given. Rows of text b are starts[b] .. starts[b + 1].
struct Pass {
    Index texts, levels, context;  // levels: 1, or one for each text; context: positions C, or 0
    const Index* starts;           // [B + 1]
    const Index* places;           // [R], in their texts
    const float *z, *last;         // [R, D]; last: or null
    const float *cos, *sin;        // [places, W / heads / 2]
    const float* modulation;       // [levels, depth 6 W + 2 W]
    const float* filter;           // [levels], of the matched filter
    const Bf16 *keys, *values;     // [depth, B, heads, C, W / heads]
    const uint8_t* seen;           // [B, C]
    Bf16* out;                     // [R, W + D]
};

// The output weight [V, W + D] and the embedding table.
struct Head {
    Index words, padded, features, dim, bytes, threads;  // padded: words up to a multiple of 256
    Weight weight;
    const uint8_t* table;  // [D / 64, padded / 2, 64, 2], in bf16
    const Bf16* rows;      // [V, W + D], as they are
};

// What is asked of the token posterior, and where it goes.
struct Posterior {
    float temperature;
    Index kept;
    const Index* keep;   // [k], tokens that are kept apart
    float* mean;         // [R, D], of words
    float* probability;  // [R, k]
    const Index* text;   // [R], where masses are wanted
    float* mass;         // [texts, padded], to which the probabilities of words are added; or null
};
}

namespace {

struct Layers {
    float* x;      // [R, W]
    Bf16* qkv;     // [R, 3 W]
    Bf16* mixed;   // [R, W], what attention gives
    Bf16* inner;   // [R, 4 W]
    Packed packed; // [R, 4 W] at most
};

struct AttentionSpace {
    Space<uint32_t> keys, values, queries, shares;
    Space<float> scores;
};

// One row [d] of queries or keys: over its root mean square, turned by its place's angle, and scaled.
INLINE void turned(const Bf16* x, Index d, const float* cos, const float* sin, float scale, Bf16* out) {
    const Vector norm = all(scale * over_root_mean_square(x, d));
    for (Index i = 0; i < d / 2; i += LANES) {
        const Vector a = _mm512_mul_ps(load(x + i), norm), b = _mm512_mul_ps(load(x + d / 2 + i), norm);
        const Vector c = load(cos + i), s = load(sin + i);
        store(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(out + d / 2 + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
}

// Puts one key [d] into its place among panels of 64 keys.
INLINE void put_key(const Bf16* key, Index d, Index j, uint32_t* panels) {
    uint32_t* to = panels + j / PANEL * (d / 2) * PANEL + j % PANEL;
    const auto* words = reinterpret_cast<const uint32_t*>(key);
    for (Index k = 0; k < d / 2; ++k) to[k * PANEL] = words[k];
}

// Puts values j (even) and j + 1 [d] beside each other into panels of 64 columns; null: 0.
INLINE void put_values(const Bf16* even, const Bf16* odd, Index d, Index j, Index steps, uint32_t* panels) {
    for (Index i = 0; i < d; i += LANES) {
        const auto half = [&](const Bf16* p) {
            return p ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))) : _mm512_setzero_si512();
        };
        const __m512i both = _mm512_or_si512(half(even), _mm512_slli_epi32(half(odd), 16));
        _mm512_storeu_si512(panels + (i / PANEL * steps + j / 2) * PANEL + i % PANEL, both);
    }
}

// Attention of one head in text b, for `share` of `shares` parts of its rows. first: the text's first row in `s`.
void attention(
    const Network& n, const Pass& p, const Layers& s, Index layer, Index b, Index head, Index first, Index share,
    Index shares, AttentionSpace& space
) {
    const Index W = n.width, d = W / n.heads, C = p.context, count = p.starts[b + 1] - p.starts[b];
    const Index limit = C + count, padded = (limit + PANEL - 1) / PANEL * PANEL, columns = (d + PANEL - 1) / PANEL;
    uint32_t* keys = space.keys.of(padded * d / 2);
    uint32_t* values = space.values.of(columns * PANEL * padded / 2);
    const Bf16* pair = nullptr;
    Index S = 0;
    const auto add = [&](const Bf16* key, const Bf16* value) {
        put_key(key, d, S, keys);
        if (S % 2) put_values(pair, value, d, S - 1, padded / 2, values);
        pair = value;
        ++S;
    };
    const Index past = ((layer * p.texts + b) * n.heads + head) * C * d;
    for (Index c = 0; c < C; ++c)
        if (p.seen[b * C + c]) add(p.keys + past + c * d, p.values + past + c * d);
    const Bf16* own = s.qkv + first * 3 * W + head * d;
    const Index* places = p.places + p.starts[b];
    const auto angle = [&](const float* table, Index i) { return table + places[i] * (d / 2); };
    alignas(64) Bf16 key[1024];
    for (Index i = 0; i < count; ++i) {
        turned(own + i * 3 * W + W, d, angle(p.cos, i), angle(p.sin, i), 1.0f, key);
        add(key, own + i * 3 * W + 2 * W);
    }
    if (S % 2) put_values(pair, nullptr, d, S - 1, padded / 2, values);

    const Index seen = (S + PANEL - 1) / PANEL * PANEL;
    float* scores = space.scores.of(ROWS * seen);
    uint32_t* queries = space.queries.of(ROWS * d / 2);
    uint32_t* probabilities = space.shares.of(ROWS * seen / 2);
    const float scale = LOG2_E / std::sqrt(static_cast<float>(d));
    const Index part = ((count + shares - 1) / shares + ROWS - 1) / ROWS * ROWS;
    by_tiles(std::min(count, share * part), std::min(count, (share + 1) * part), [&](auto rows, Index i) {
        constexpr int M = decltype(rows)::value;
        for (int m = 0; m < M; ++m)
            turned(own + (i + m) * 3 * W, d, angle(p.cos, i + m), angle(p.sin, i + m), scale,
                   reinterpret_cast<Bf16*>(queries + m * d / 2));
        for (Index j = 0; j < seen; j += PANEL) {
            Vector sums[4 * M];
            tile<Halves, M>(queries, d / 2, reinterpret_cast<uint8_t*>(keys + j * d / 2), d / 2, sums);
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < 4; ++v) store(scores + m * seen + j + v * LANES, sums[4 * m + v]);
        }
        float total[M];
        for (int m = 0; m < M; ++m) {
            float* row = scores + m * seen;
            auto* out = reinterpret_cast<Bf16*>(probabilities + m * seen / 2);
            std::fill(row + S, row + seen, NEVER);
            Vector top = all(NEVER), sum = _mm512_setzero_ps();
            for (Index j = 0; j < seen; j += LANES) top = _mm512_max_ps(top, load(row + j));
            top = all(_mm512_reduce_max_ps(top));
            for (Index j = 0; j < seen; j += LANES) {
                const Vector e = exp2(_mm512_sub_ps(load(row + j), top));
                sum = _mm512_add_ps(sum, e);
                store(out + j, e);
            }
            total[m] = _mm512_reduce_add_ps(sum);
        }
        for (Index column = 0; column < d; column += PANEL) {
            Vector sums[4 * M];
            const auto* panel = reinterpret_cast<uint8_t*>(values + column * padded / 2);
            tile<Halves, M>(probabilities, seen / 2, panel, (S + 1) / 2, sums);
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < 4; ++v)
                    if (column + v * LANES < d)
                        store(s.mixed + (first + i + m) * W + head * d + column + v * LANES,
                              _mm512_mul_ps(sums[4 * m + v], all(1 / total[m])));
        }
    });
}

// Texts [from, to) through all layers.
template <class T>
void through_layers(const Network& n, const Pass& p, Index from, Index to, const Layers& s) {
    const Index W = n.width, D = n.dim, start = p.starts[from], R = p.starts[to] - start;
    const Index of_level = n.depth * 6 * W + 2 * W, pairs = (to - from) * n.heads;
    const Weight* weights = n.weights;
    std::vector<Index> text(R);
    for (Index b = from; b < to; ++b) std::fill(text.begin() + (p.starts[b] - start), text.begin() + (p.starts[b + 1] - start), b);
    const auto level = [&](Index row) { return p.levels == 1 ? 0 : text[row]; };
    // The six vectors of a layer: shift, scale and gate of attention, then of the MLP.
    const auto vector = [&](Index row, Index layer, Index which) {
        return p.modulation + level(row) * of_level + (layer * 6 + which) * W;
    };
    const Packed half = {s.packed.words, D, nullptr, nullptr};
    const Packed wide = {s.packed.words, 4 * W / T::IN_WORD, s.packed.scale, s.packed.shift};
    const Packed thin = {s.packed.words, W / T::IN_WORD, s.packed.scale, s.packed.shift};
    const auto as_it_is = [](Bf16* x, Index stride) { return Packed{reinterpret_cast<uint32_t*>(x), stride / 2, nullptr, nullptr}; };
    constexpr bool rounds = std::is_same_v<T, Bytes>;

#pragma omp parallel num_threads(n.threads)
    {
        static thread_local AttentionSpace space;
        const auto modulate = [&](Index layer, Index which) {
#pragma omp for schedule(static)
            for (Index r = 0; r < R; ++r)
                T::pack(thin, r, W, modulated(s.x + r * W, W, vector(r, layer, which), vector(r, layer, which + 1)));
        };
        // What is rounded to 8 bits, whole rows at a time.
        const auto pack = [&](const Bf16* x, Index width, const Packed& packed) {
#pragma omp for schedule(static)
            for (Index r = 0; r < R; ++r) T::pack(packed, r, width, [&](Index i) { return load(x + r * width + i); });
        };
        const auto add_to_x = [&](const Packed& rows, const Weight& weight, Index layer, Index gate) {
            product<T>(rows, R, weight, [&](Index r, Index c, Vector y) {
                float* x = s.x + r * W + c;
                store(x, _mm512_fmadd_ps(y, load(vector(r, layer, gate) + c), _mm512_add_ps(load(x), y)));
            });
        };

#pragma omp for schedule(static)
        for (Index r = 0; r < R; ++r)
            Halves::pack(half, r, 2 * D, [&](Index i) {
                if (i < D) return load(p.z + (start + r) * D + i);
                return p.last ? load(p.last + (start + r) * D + i - D) : _mm512_setzero_ps();
            });
        product<Halves>(half, R, weights[0], [&](Index r, Index c, Vector y) { store(s.x + r * W + c, y); });

        for (Index layer = 0; layer < n.depth; ++layer) {
            const Weight *qkv = weights + 1 + 4 * layer, *out = qkv + 1, *up = qkv + 2, *down = qkv + 3;
            modulate(layer, 0);
            product<T>(thin, R, *qkv, [&](Index r, Index c, Vector y) { store(s.qkv + r * 3 * W + c, y); });
            const Index shares = (n.threads + pairs - 1) / pairs;
#pragma omp for schedule(dynamic)
            for (Index item = 0; item < pairs * shares; ++item) {
                const Index pair = item / shares, b = from + pair / n.heads;
                attention(n, p, s, layer, b, pair % n.heads, p.starts[b] - start, item % shares, shares, space);
            }
            if constexpr (rounds) pack(s.mixed, W, thin);
            add_to_x(rounds ? thin : as_it_is(s.mixed, W), *out, layer, 2);
            modulate(layer, 3);
            product<T>(thin, R, *up, [&](Index r, Index c, Vector y) {
                y = _mm512_max_ps(y, _mm512_setzero_ps());
                store(s.inner + r * 4 * W + c, _mm512_mul_ps(y, y));
            });
            if constexpr (rounds) pack(s.inner, 4 * W, wide);
            add_to_x(rounds ? wide : as_it_is(s.inner, 4 * W), *down, layer, 5);
        }

#pragma omp for schedule(static)
        for (Index r = 0; r < R; ++r) {
            Bf16* out = p.out + (start + r) * (W + D);
            const auto y = modulated(s.x + r * W, W, vector(r, n.depth, 0), vector(r, n.depth, 1));
            for (Index i = 0; i < W; i += LANES) store(out + i, y(i));
            const Vector filter = all(p.filter[level(r)]);
            for (Index i = 0; i < D; i += LANES) store(out + W + i, _mm512_mul_ps(filter, load(p.z + (start + r) * D + i)));
        }
    }
}

// --------------------------------------------------------------------------------------------- the vocabulary

struct HeadSpace {
    Space<uint32_t> words, shares;
    Space<float> scale, partial, logits, values;
    Space<int32_t> shift, tokens;
};

// How the threads share rows [R] by the vocabulary.
struct Shares {
    Index blocks, rows, splits, words;
    Shares(const Head& head, Index R) {
        blocks = (R + 191) / 192;
        rows = ((R + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
        blocks = (R + rows - 1) / rows;
        const Index most = head.padded / BLOCK, wanted = (4 * head.threads + blocks - 1) / blocks;
        words = (most + std::min(most, wanted) - 1) / std::min(most, wanted) * BLOCK;
        splits = (head.padded + words - 1) / words;
    }
};

// Logits [M, 256] of some rows and words, times log2 e.
template <class T, int M>
INLINE void logits_of(const Head& head, const Packed& rows, Index row, Index word, float* logits) {
    const Weight& weight = head.weight;
    for (Index column = word; column < word + BLOCK; column += PANEL) {
        typename T::Sum sums[4 * M];
        const uint8_t* panel = weight.panels + column / PANEL * weight.steps * 256;
        tile<T, M>(rows.words + row * rows.stride, rows.stride, panel, weight.steps, sums);
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) {
                const Vector y = T::value(sums[4 * m + j], rows, row + m, weight, column + j * LANES);
                store(logits + m * BLOCK + column - word + j * LANES, _mm512_mul_ps(y, all(LOG2_E)));
            }
    }
    for (Index column = std::max(word, head.words); column < word + BLOCK; ++column)
        for (int m = 0; m < M; ++m) logits[m * BLOCK + column - word] = NEVER;
}

// Takes tokens out of logits [M, 256] of the words from `word` on.
INLINE void leave_out(Index word, Index kept, const Index* keep, int M, float* logits) {
    for (Index k = 0; k < kept; ++k)
        if (word <= keep[k] && keep[k] < word + BLOCK)
            for (int m = 0; m < M; ++m) logits[m * BLOCK + keep[k] - word] = NEVER;
}

// The logit of one token by a product that is not rounded, of features h [H].
INLINE float exact_logit(const Head& head, const Bf16* h, Index token) {
    const Bf16* weight = head.rows + token * head.features;
    Vector sum = _mm512_setzero_ps();
    for (Index i = 0; i < head.features; i += LANES) sum = _mm512_fmadd_ps(load(h + i), load(weight + i), sum);
    return _mm512_reduce_add_ps(sum);
}

template <class T>
Packed packed_features(const Head& head, Index R, HeadSpace& space) {
    return {space.words.of(R * head.features / T::IN_WORD), head.features / T::IN_WORD, space.scale.of(R), space.shift.of(R)};
}

template <class T>
INLINE void pack_features(const Head& head, const Bf16* h, Index R, const Packed& rows) {
#pragma omp for schedule(static)
    for (Index r = 0; r < R; ++r) T::pack(rows, r, head.features, [&](Index i) { return load(h + r * head.features + i); });
}

// Of some rows and some words: the largest logit, the sum of probabilities over that of the largest, the same at the
// temperature, and by these the sum of embeddings.
struct Partial {
    float *best, *plain, *cold, *mean;
};

template <class T>
void posterior(const Head& head, Index R, const Bf16* h, const Posterior& to_find) {
    static thread_local HeadSpace space;
    const float temperature = to_find.temperature;
    const Index kept = to_find.kept, *keep = to_find.keep, *text = to_find.text;
    float *mean = to_find.mean, *probability = to_find.probability, *mass = to_find.mass;
    const Index D = head.dim, panels = (D + PANEL - 1) / PANEL, width = panels * PANEL;
    const Shares shares(head, R);
    const Packed rows = packed_features<T>(head, R, space);
    float* partial = space.partial.of(shares.splits * R * (3 + width));
    const auto part = [&](Index split, Index row) {
        float* best = partial + (split * R + row) * (3 + width);
        return Partial{best, best + 1, best + 2, best + 3};
    };
    float* over_all = space.values.of(2 * R);  // the largest logit of each row, and 1 / its sum at the temperature
    const bool neutral = temperature == 1.0f;
    const Vector inverse = all(1 / temperature);

#pragma omp parallel num_threads(head.threads)
    {
        static thread_local HeadSpace own;
        float* logits = own.logits.of(ROWS * BLOCK);
        uint32_t* shared = own.shares.of(ROWS * BLOCK / 2);
        pack_features<T>(head, h, R, rows);
#pragma omp for schedule(dynamic) collapse(2)
        for (Index split = 0; split < shares.splits; ++split) {
            for (Index block = 0; block < shares.blocks; ++block) {
                const Index first = block * shares.rows, last = std::min(R, first + shares.rows);
                for (Index row = first; row < last; ++row) {
                    const Partial to = part(split, row);
                    *to.best = NEVER;
                    std::fill(to.plain, to.mean + width, 0.0f);
                }
                const Index end = std::min(head.padded, (split + 1) * shares.words);
                for (Index word = split * shares.words; word < end; word += BLOCK)
                    by_tiles(first, last, [&](auto count, Index row) {
                        constexpr int M = decltype(count)::value;
                        logits_of<T, M>(head, rows, row, word, logits);
                        leave_out(word, kept, keep, M, logits);
                        float fades[M];
                        for (int m = 0; m < M; ++m) {
                            const Partial to = part(split, row + m);
                            const float* x = logits + m * BLOCK;
                            auto* p = reinterpret_cast<Bf16*>(shared + m * BLOCK / 2);
                            Vector top = all(*to.best), plain = _mm512_setzero_ps(), cold = _mm512_setzero_ps();
                            for (Index j = 0; j < BLOCK; j += LANES) top = _mm512_max_ps(top, load(x + j));
                            const float higher = _mm512_reduce_max_ps(top), fall = *to.best - higher;
                            top = all(higher);
                            for (Index j = 0; j < BLOCK; j += LANES) {
                                const Vector y = _mm512_sub_ps(load(x + j), top), e = exp2(y);
                                const Vector c = neutral ? e : exp2(_mm512_mul_ps(y, inverse));
                                plain = _mm512_add_ps(plain, e);
                                cold = _mm512_add_ps(cold, c);
                                store(p + j, c);
                            }
                            fades[m] = exp2(fall / temperature);
                            *to.plain = *to.plain * exp2(fall) + _mm512_reduce_add_ps(plain);
                            *to.cold = *to.cold * fades[m] + _mm512_reduce_add_ps(cold);
                            *to.best = higher;
                        }
                        for (Index panel = 0; panel < panels; ++panel) {
                            Vector sums[4 * M];
                            tile<Halves, M>(shared, BLOCK / 2, head.table + (panel * head.padded + word) * 128, BLOCK / 2, sums);
                            for (int m = 0; m < M; ++m)
                                for (int j = 0; j < 4; ++j) {
                                    float* to = part(split, row + m).mean + panel * PANEL + j * LANES;
                                    store(to, _mm512_fmadd_ps(load(to), all(fades[m]), sums[4 * m + j]));
                                }
                        }
                    });
            }
        }
#pragma omp for schedule(static)
        for (Index row = 0; row < R; ++row) {
            float best = NEVER, plain = 0, cold = 0;
            for (Index split = 0; split < shares.splits; ++split) best = std::max(best, *part(split, row).best);
            float* to = mean + row * D;
            std::fill(to, to + D, 0.0f);
            for (Index split = 0; split < shares.splits; ++split) {
                const Partial from = part(split, row);
                const float fall = *from.best - best, weight = exp2(fall / temperature);
                plain += *from.plain * exp2(fall);
                cold += *from.cold * weight;
                for (Index i = 0; i < D; ++i) to[i] += weight * from.mean[i];
            }
            for (Index i = 0; i < D; ++i) to[i] /= cold;
            over_all[2 * row] = best;
            over_all[2 * row + 1] = 1 / cold;
            float *ends = probability + row * kept, top = best, sum = plain;
            for (Index k = 0; k < kept; ++k) {
                ends[k] = exact_logit(head, h + row * head.features, keep[k]) * LOG2_E;
                top = std::max(top, ends[k]);
            }
            sum *= exp2(best - top);
            for (Index k = 0; k < kept; ++k) sum += ends[k] = exp2(ends[k] - top);
            for (Index k = 0; k < kept; ++k) ends[k] /= sum;
        }
        // Each block of words is one thread's, so nobody waits to add.
#pragma omp for schedule(dynamic)
        for (Index word = 0; word < (mass ? head.padded : 0); word += BLOCK)
            by_tiles(0, R, [&](auto count, Index row) {
                constexpr int M = decltype(count)::value;
                logits_of<T, M>(head, rows, row, word, logits);
                leave_out(word, kept, keep, M, logits);
                for (Index i = row; i < row + M; ++i) {
                    float* to = mass + text[i] * head.padded + word;
                    const float* x = logits + (i - row) * BLOCK;
                    const Vector best = all(over_all[2 * i]), share = all(over_all[2 * i + 1]);
                    for (Index j = 0; j < BLOCK; j += LANES) {
                        const Vector p = exp2(_mm512_mul_ps(_mm512_sub_ps(load(x + j), best), inverse));
                        store(to + j, _mm512_fmadd_ps(p, share, load(to + j)));
                    }
                }
            });
    }
}

// Tokens among which are those with the K largest logits, K a multiple of 16. K / 16 vectors hold the largest numbers
// of each lane: K numbers, none of which is below `least`, so what is below it is out.
struct Largest {
    float* lanes;    // [K]
    float* values;   // [room]
    int32_t* tokens;
    Index count, size = 0;
    float least = 2 * NEVER;

    static Index room(Index K) { return 16 * K + BLOCK; }

    INLINE void add(const float* logits, Index word) {
        for (Index j = 0; j < BLOCK; j += LANES) {
            Vector x = load(logits + j);
            for (Index i = 0; i < count; i += LANES) {
                const Vector held = load(lanes + i);
                store(lanes + i, _mm512_max_ps(held, x));
                x = _mm512_min_ps(held, x);
            }
        }
        least = _mm512_reduce_min_ps(load(lanes + count - LANES));
        for (Index j = 0; j < BLOCK; j += LANES)
            for (uint32_t in = _mm512_cmp_ps_mask(load(logits + j), all(least), _CMP_GE_OQ); in; in &= in - 1) {
                const int lane = __builtin_ctz(in);
                values[size] = logits[j + lane];
                tokens[size++] = static_cast<int32_t>(word + j + lane);
            }
        if (size > room(count) - BLOCK) drop(values, tokens);
    }
    // Keeps the K largest, and writes them elsewhere if wanted.
    template <class Token>
    void drop(float* to_values, Token* to_tokens) {
        std::vector<std::pair<float, int32_t>> found;
        for (Index i = 0; i < size; ++i)
            if (values[i] >= least) found.emplace_back(-values[i], tokens[i]);
        std::nth_element(found.begin(), found.begin() + count - 1, found.end());
        for (size = 0; size < count; ++size) {
            to_values[size] = -found[size].first;
            to_tokens[size] = found[size].second;
        }
    }
};

template <class T>
void most_probable(const Head& head, Index R, const Bf16* h, Index K, float* scores, Index* tokens) {
    static thread_local HeadSpace space;
    const Shares shares(head, R);
    const Packed rows = packed_features<T>(head, R, space);
    const Index lists = shares.splits * R, room = Largest::room(K);
    float* lanes = space.partial.of(lists * K);
    float* values = space.values.of(lists * room);
    int32_t* ids = space.tokens.of(lists * room);
    std::fill(lanes, lanes + lists * K, 2 * NEVER);
    std::vector<Largest> found(lists);
    for (Index i = 0; i < lists; ++i) found[i] = {lanes + i * K, values + i * room, ids + i * room, K};

#pragma omp parallel num_threads(head.threads)
    {
        static thread_local HeadSpace own;
        float* logits = own.logits.of(ROWS * BLOCK);
        pack_features<T>(head, h, R, rows);
#pragma omp for schedule(dynamic) collapse(2)
        for (Index split = 0; split < shares.splits; ++split) {
            for (Index block = 0; block < shares.blocks; ++block) {
                const Index first = block * shares.rows, last = std::min(R, first + shares.rows);
                const Index end = std::min(head.padded, (split + 1) * shares.words);
                for (Index word = split * shares.words; word < end; word += BLOCK)
                    by_tiles(first, last, [&](auto count, Index row) {
                        constexpr int M = decltype(count)::value;
                        logits_of<T, M>(head, rows, row, word, logits);
                        for (int m = 0; m < M; ++m) found[split * R + row + m].add(logits + m * BLOCK, word);
                    });
            }
        }
        std::vector<float> value(shares.splits * room);
        std::vector<int32_t> token(shares.splits * room);
#pragma omp for schedule(static)
        for (Index row = 0; row < R; ++row) {
            Largest whole = {nullptr, value.data(), token.data(), K};
            for (Index split = 0; split < shares.splits; ++split) {
                const Largest& from = found[split * R + row];
                std::copy_n(from.values, from.size, whole.values + whole.size);
                std::copy_n(from.tokens, from.size, whole.tokens + whole.size);
                whole.size += from.size;
                whole.least = std::max(whole.least, from.least);
            }
            whole.drop(scores + row * K, tokens + row * K);
            // Rounded logits may be nats off.
            for (Index k = row * K; k < (row + 1) * K; ++k) scores[k] = exact_logit(head, h + row * head.features, tokens[k]);
        }
    }
}

void forward_of(const Network* network, const Pass* pass) {
    static thread_local Space<float> x, scale;
    static thread_local Space<Bf16> qkv, mixed, inner;
    static thread_local Space<uint32_t> words;
    static thread_local Space<int32_t> shift;
    const Index W = network->width;
    for (Index from = 0, to; from < pass->texts; from = to) {
        to = from + 1;
        while (to < pass->texts && pass->starts[to + 1] - pass->starts[from] <= AT_ONCE) ++to;
        const Index R = pass->starts[to] - pass->starts[from];
        const Packed packed = {words.of(R * std::max(2 * W, network->dim)), 0, scale.of(R), shift.of(R)};
        const Layers layers = {x.of(R * W), qkv.of(R * 3 * W), mixed.of(R * W), inner.of(R * 4 * W), packed};
        if (network->bytes)
            through_layers<Bytes>(*network, *pass, from, to, layers);
        else
            through_layers<Halves>(*network, *pass, from, to, layers);
    }
}

void posterior_of(const Head* head, Index R, const Bf16* h, const Posterior* whole) {
    for (Index r = 0; r < R; r += AT_ONCE) {
        Posterior part = *whole;
        part.mean += r * head->dim;
        part.probability += r * part.kept;
        part.text += part.mass ? r : 0;
        const auto run = head->bytes ? posterior<Bytes> : posterior<Halves>;
        run(*head, std::min(AT_ONCE, R - r), h + r * head->features, part);
    }
}

void largest_of(const Head* head, Index R, const Bf16* h, Index K, float* scores, Index* tokens) {
    for (Index r = 0; r < R; r += AT_ONCE) {
        const auto run = head->bytes ? most_probable<Bytes> : most_probable<Halves>;
        run(*head, std::min(AT_ONCE, R - r), h + r * head->features, K, scores + r * K, tokens + r * K);
    }
}

void path_of(Index B, Index L, Index K, const float* scores, const float* pairs, Index* path, Index threads) {
#pragma omp parallel for num_threads(threads)
    for (Index b = 0; b < B; ++b) {
        std::vector<int32_t> back(L * K);
        std::vector<float> total(scores + b * L * K, scores + b * L * K + K), next(K);
        for (Index l = 1; l < L; ++l) {
            const float* pair = pairs + (b * (L - 1) + l - 1) * K * K;
            for (Index j = 0; j < K; j += LANES) {
                Vector best = all(-INFINITY);
                __m512i from = _mm512_setzero_si512();
                for (Index i = 0; i < K; ++i) {
                    const Vector here = _mm512_add_ps(all(total[i]), load(pair + i * K + j));
                    const __mmask16 higher = _mm512_cmp_ps_mask(here, best, _CMP_GT_OQ);
                    best = _mm512_mask_mov_ps(best, higher, here);
                    from = _mm512_mask_mov_epi32(from, higher, _mm512_set1_epi32(static_cast<int>(i)));
                }
                store(next.data() + j, _mm512_add_ps(best, load(scores + (b * L + l) * K + j)));
                _mm512_storeu_si512(back.data() + l * K + j, from);
            }
            std::swap(total, next);
        }
        Index best = std::max_element(total.begin(), total.end()) - total.begin();
        for (Index l = L - 1; l >= 0; --l) {
            path[b * L + l] = best;
            best = back[l * K + best];
        }
    }
}

template <class Run>
int without_exceptions(Run run) {
    try {
        run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ what is called

// All return 0, or 1 where there is no memory.
extern "C" {

// The denoiser's features.
int forward(const Network* network, const Pass* pass) {
    return without_exceptions([=] { forward_of(network, pass); });
}

// The token posterior of features [R, H].
int token_posterior(const Head* head, Index R, const Bf16* h, const Posterior* to_find) {
    return without_exceptions([=] { posterior_of(head, R, h, to_find); });
}

// The largest logits [R, K] and their tokens [R, K], of features [R, H]; in no order.
int largest_logits(const Head* head, Index R, const Bf16* h, Index K, float* scores, Index* tokens) {
    return without_exceptions([=] { largest_of(head, R, h, K, scores, tokens); });
}

// Which of K candidates to take at each of L positions of B texts, see `ops.best_path_reference`; K a multiple of 16.
int best_path(Index B, Index L, Index K, const float* scores, const float* pairs, Index* path, Index threads) {
    return without_exceptions([=] { path_of(B, L, K, scores, pairs, path, threads); });
}
}
