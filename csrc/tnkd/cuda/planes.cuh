// Planes (NCHW): the pixels of a class side by side. Lanes read neighbouring pixels straight into registers.
#pragma once

#include <bit>
#include <type_traits>

#include "logits.cuh"

namespace dsct::cuda {

// Words as loaded: they hold one or two numbers, and wait in registers as they are.
template <int kBytes>
using Word = std::conditional_t<kBytes == 2, unsigned short, unsigned>;
template <int kBytes>
using Words = Pack<Word<kBytes>, kBytes / sizeof(Word<kBytes>)>;

// -inf, in a word or in either half of one.
template <typename E>
DSCT_DEVICE constexpr unsigned absent_word() {
  return sizeof(E) == 4 ? 0xff800000u : std::is_same_v<E, Half> ? 0xfc00fc00u : 0xff80ff80u;
}
// The number that is a word, or its lower or upper half.
template <typename E>
DSCT_DEVICE float number_in(unsigned word, int half) {
  if constexpr (sizeof(E) == 4) return std::bit_cast<float>(word);
  if constexpr (std::is_same_v<E, BFloat16>) return std::bit_cast<float>(half ? word & 0xffff0000u : word << 16);
  return Half(static_cast<unsigned short>(word >> (16 * half)), Half::from_bits());
}

// base + i * step, in one instruction where i is known: the compiler, left to itself, carries 64-bit sums from class to
// class.
DSCT_DEVICE unsigned char* stepped(unsigned char* base, unsigned step, int i) {
#ifdef __CUDA_ARCH__
  unsigned char* at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(step), "r"(i), "l"(base));
  return at;
#else
  return base + static_cast<uint64_t>(step) * i;
#endif
}

// Where logits of kS and kT bytes come from, kPixels a thread. Two networks of two bytes have one dtype, which is asked
// once for all of a thread's, before they are loaded: asked behind that, a constant for absent ones took a register.
template <int kS_, int kT_, int kPixels_>
struct Planes : Place {
  static constexpr int kS = kS_, kT = kT_, kPixels = kPixels_;
  using Place::Place;

  DSCT_DEVICE void fetch() const {}
  DSCT_DEVICE void put_back() const {}

  // Class j (of all) of the thread's pixel v, of kSize bytes.
  template <int kSize>
  DSCT_DEVICE unsigned char* number(const LogitMap& net, int v, int j) const {
    return net.data + image * in.pixels * in.classes * kSize + j * static_cast<uint64_t>(net.step) +
           (start + at + v) * kSize;
  }

  template <typename E, int kClasses>
  DSCT_DEVICE void load_one(const LogitMap& net, Words<sizeof(E) * kPixels> (&bits)[kClasses]) const {
    using W = Word<sizeof(E) * kPixels>;
    constexpr int kWords = Words<sizeof(E) * kPixels>::kSize;
    unsigned char* base = number<sizeof(E)>(net, 0, first);
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      for (W& word : bits[i].lane) word = static_cast<W>(absent_word<E>());
      if (i < sure_classes(kClasses) || i < classes) {
        bits[i] = load_pack<W, kWords>(reinterpret_cast<const W*>(stepped(base, net.step, i)));
      }
    }
  }
  template <typename E, int kClasses>
  static DSCT_DEVICE void to_floats(const Words<sizeof(E) * kPixels> (&bits)[kClasses], float (&z)[kPixels][kClasses]) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) z[v][i] = number_in<E>(bits[i].lane[v * sizeof(E) / 4], v % 2);
    }
  }
  template <int kClasses>
  DSCT_DEVICE void load(float (&s)[kPixels][kClasses], float (&t)[kPixels][kClasses]) const {
    by_type<kT>(in.teacher.type, [&]<typename T>(T*) {
      using S = std::conditional_t<kS == 4, float, T>;
      Words<kS * kPixels> bits_s[kClasses];
      Words<kT * kPixels> bits_t[kClasses];
      load_one<S>(in.student, bits_s);
      load_one<T>(in.teacher, bits_t);
      to_floats<S>(bits_s, s);
      to_floats<T>(bits_t, t);
    });
  }

  template <int kClasses>
  DSCT_DEVICE void store(const float (&g)[kPixels][kClasses]) const {
    unsigned char* base = number<kS>(in.grad, 0, first);
    by_type<kS>(in.grad.type, [&]<typename E>(E*) {
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        Pack<E, kPixels> run;
#pragma unroll
        for (int v = 0; v < kPixels; ++v) run.lane[v] = static_cast<E>(g[v][i]);
        if (i < sure_classes(kClasses) || i < classes) {
          store_pack(reinterpret_cast<E*>(stepped(base, in.grad.step, i)), run);
        }
      }
    });
  }
};

}  // namespace dsct::cuda
