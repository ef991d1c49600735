// Blocks of N rows (pixels) by C columns (classes) between "a row is contiguous in memory" and "a lane is a row".
#pragma once

#include "vec.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <int... i>
struct Indices {};
template <int n, int... i>
struct MakeIndices : MakeIndices<n - 1, n - 1, i...> {};
template <int... i>
struct MakeIndices<0, i...> {
  typedef Indices<i...> type;
};

// Within each chunk of C lanes: the low (or high) half of a and of b, interleaved.
template <class A, int C, int high, int... i>
DSCT_INLINE typename A::V interleave(typename A::V a, typename A::V b, Indices<i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return (typename A::V)__builtin_shufflevector(a, b, ((i & 1) * A::N + i / C * C + high * (C / 2) + i % C / 2)...);
#else
  const typename A::I order = {((i & 1) * A::N + i / C * C + high * (C / 2) + i % C / 2)...};
  return (typename A::V)__builtin_shuffle(a, b, order);
#endif
}

// C vectors of N / C chunks: transposes the C x C block of every chunk. Its own inverse.
template <class A, int C>
DSCT_INLINE void transpose_chunks(typename A::V* v) {
  typedef typename MakeIndices<A::N>::type All;
  typename A::V other[C];
  for (int done = 1; done < C; done *= 2) {  // log2(C) perfect shuffles
    for (int i = 0; i < C / 2; i++) {
      other[2 * i] = interleave<A, C, 0>(v[i], v[i + C / 2], All());
      other[2 * i + 1] = interleave<A, C, 1>(v[i], v[i + C / 2], All());
    }
    for (int i = 0; i < C; i++) v[i] = other[i];
  }
}

// N / C chunks of C elements each, `stride` elements apart, as one vector.
template <int C>
struct Chunk {};
template <class A, class T>
DSCT_INLINE typename A::V load_chunks(A, Chunk<A::N>, const T* p, int64_t) {
  return A::load(p);
}

// The chunk widths below N that are worth having: a remainder of 3 classes does not pay for 16.
#if defined(DSCT_ISA_AVX512) || defined(DSCT_ISA_AVX2)
DSCT_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
DSCT_INLINE __m128i load8x2(const void* p, const void* q) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p)),
                            _mm_loadl_epi64(static_cast<const __m128i*>(q)));
}
DSCT_INLINE __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
#endif

#if defined(DSCT_ISA_AVX512)
DSCT_INLINE __m512 load_chunks(F32, Chunk<8>, const float* p, int64_t stride) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + stride), 1);
}
DSCT_INLINE __m512 load_chunks(F32, Chunk<4>, const float* p, int64_t stride) {
  const __m256i low = join(load16(p), load16(p + stride));
  const __m256i high = join(load16(p + 2 * stride), load16(p + 3 * stride));
  return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
template <class Half>
DSCT_INLINE __m512 load_chunks(F32, Chunk<8>, const Half* p, int64_t stride) {
  return F32::widen(join(load16(p), load16(p + stride)), p);
}
template <class Half>
DSCT_INLINE __m512 load_chunks(F32, Chunk<4>, const Half* p, int64_t stride) {
  return F32::widen(join(load8x2(p, p + stride), load8x2(p + 2 * stride, p + 3 * stride)), p);
}
#elif defined(DSCT_ISA_AVX2)
DSCT_INLINE F32::V load_chunks(F32, Chunk<4>, const float* p, int64_t stride) {
  return (F32::V)join(load16(p), load16(p + stride));
}
template <class Half>
DSCT_INLINE F32::V load_chunks(F32, Chunk<4>, const Half* p, int64_t stride) {
  return F32::widen(load8x2(p, p + stride), p);
}
#endif

// What `columns` classes are best moved with: a chunk width that has the loads above.
template <class A>
DSCT_INLINE int chunk_for(int64_t columns) {
  if (sizeof(typename A::S) == 4 && A::N == 16 && columns <= 8) return columns <= 4 ? 4 : 8;
  if (sizeof(typename A::S) == 4 && A::N == 8 && columns <= 4) return 4;
  return A::N;
}

// Reads N rows of C elements, `pitch` apart: v[c] gets column c, a lane per row.
template <class A, int C, class T>
DSCT_INLINE void load_transposed(const T* p, int64_t pitch, typename A::V* v) {
  for (int j = 0; j < C; j++) v[j] = load_chunks(A(), Chunk<C>(), p + j * pitch, C * pitch);
  transpose_chunks<A, C>(v);
}

// The reverse. Rows are written in rising order, all C elements of each.
template <class A, int C, class T>
DSCT_INLINE void store_transposed(T* p, int64_t pitch, typename A::V* v) {
  transpose_chunks<A, C>(v);
  if (C == A::N) {
    for (int j = 0; j < C; j++) A::store(p + j * pitch, v[j]);
    return;
  }
  T rows[C][A::N];
  for (int j = 0; j < C; j++) A::store(rows[j], v[j]);
  for (int i = 0; i < A::N; i++) memcpy(p + i * pitch, rows[i % C] + i / C * C, C * sizeof(T));
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
