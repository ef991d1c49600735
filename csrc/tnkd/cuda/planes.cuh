// Planes (NCHW): the pixels of a class side by side. Lanes read neighbouring pixels straight into registers.
#pragma once

#include <bit>
#include <type_traits>

#include "logits.cuh"

namespace dsct::cuda {

template <int kBytes>
struct alignas(kBytes) Words {
  unsigned word[kBytes / 4];
};
template <>
struct Words<2> {
  unsigned short word[1];
};

// Read once, written once: not to stay in L1.
template <int kBytes>
DSCT_DEVICE Words<kBytes> load_once(const void* from) {
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 2) return {__ldcs(static_cast<const unsigned short*>(from))};
  if constexpr (kBytes == 4) return {__ldcs(static_cast<const unsigned*>(from))};
  if constexpr (kBytes == 8) return std::bit_cast<Words<8>>(__ldcs(static_cast<const uint2*>(from)));
  if constexpr (kBytes == 16) return std::bit_cast<Words<16>>(__ldcs(static_cast<const uint4*>(from)));
#else
  return *static_cast<const Words<kBytes>*>(from);
#endif
}
// What neighbours read too, 2 or 4 bytes.
template <int kBytes>
DSCT_DEVICE Words<kBytes> load_through(const void* from) {
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 2) return {__ldg(static_cast<const unsigned short*>(from))};
  if constexpr (kBytes == 4) return {__ldg(static_cast<const unsigned*>(from))};
#else
  return *static_cast<const Words<kBytes>*>(from);
#endif
}
template <int kBytes>
DSCT_DEVICE void store_once(void* to, const Words<kBytes>& words) {
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 2) __stcs(static_cast<unsigned short*>(to), words.word[0]);
  if constexpr (kBytes == 4) __stcs(static_cast<unsigned*>(to), words.word[0]);
  if constexpr (kBytes == 8) __stcs(static_cast<uint2*>(to), std::bit_cast<uint2>(words));
  if constexpr (kBytes == 16) __stcs(static_cast<uint4*>(to), std::bit_cast<uint4>(words));
#else
  *static_cast<Words<kBytes>*>(to) = words;
#endif
}

// base + i * step, in one instruction: the compiler, left to itself, carries 64-bit sums from class to class.
template <int i>
DSCT_DEVICE unsigned char* stepped(unsigned char* base, unsigned step) {
#ifdef __CUDA_ARCH__
  unsigned char* at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(step), "n"(i), "l"(base));
  return at;
#else
  return base + static_cast<uint64_t>(step) * i;
#endif
}

// Calls body(integral_constant<int, 0>) ... body(<kCount - 1>): a loop whose index is a constant.
template <int kCount, int kFirst = 0, typename Body>
DSCT_DEVICE void repeat(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    repeat<kCount, kFirst + 1>(body);
  }
}

// Where logits of kS and kT bytes come from, kPixels a thread. Whether two bytes are bfloat16 or float16 is asked once
// for all of a thread's.
template <int kS, int kT, int kPixels_>
struct Planes {
  static constexpr int kPixels = kPixels_;

  // Two networks of two bytes have one dtype.
  static DSCT_DEVICE FloatType teacher_type(const Logits& in) { return kS == 2 ? in.student.type : in.teacher.type; }

  static DSCT_DEVICE void fetch(const Logits&, const Place&, unsigned char*) {}
  static DSCT_DEVICE void put_back(const Logits&, const Place&, unsigned char*) {}

  template <int kSize>
  static DSCT_DEVICE unsigned char* first(const LogitMap& net, const Place& p) {
    return net.data + p.image * net.image + p.first * static_cast<uint64_t>(net.step) + (p.start + p.at) * kSize;
  }

  template <typename E, int kClasses>
  static DSCT_DEVICE void load_one(const LogitMap& net, const Place& p, Words<sizeof(E) * kPixels> (&bits)[kClasses]) {
    unsigned char* base = first<sizeof(E)>(net, p);
    repeat<kClasses>([&](auto index) {
      constexpr int i = decltype(index)::value;
      for (auto& word : bits[i].word) word = static_cast<std::remove_reference_t<decltype(word)>>(absent_word<E>());
      if (i < sure_classes(kClasses) || i < p.classes) {
        bits[i] = load_once<sizeof(E) * kPixels>(stepped<i>(base, net.step));
      }
    });
  }
  template <typename E, int kClasses>
  static DSCT_DEVICE void to_floats(const Words<sizeof(E) * kPixels> (&bits)[kClasses], float (&z)[kPixels][kClasses]) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) z[v][i] = number_in<E>(bits[i].word[v * sizeof(E) / 4], v % 2);
    }
  }
  template <int kClasses>
  static DSCT_DEVICE void load(const Logits& in, const Place& p, unsigned char*, float (&s)[kPixels][kClasses],
                               float (&t)[kPixels][kClasses]) {
    by_type<kT>(teacher_type(in), [&]<typename T>(T*) {
      using S = std::conditional_t<kS == 4, float, T>;
      Words<kS * kPixels> bits_s[kClasses];
      Words<kT * kPixels> bits_t[kClasses];
      load_one<S>(in.student, p, bits_s);
      load_one<T>(in.teacher, p, bits_t);
      to_floats<S>(bits_s, s);
      to_floats<T>(bits_t, t);
    });
  }

  template <int kClasses>
  static DSCT_DEVICE void store(const Logits& in, const Place& p, unsigned char*, const float (&g)[kPixels][kClasses]) {
    unsigned char* base = first<kS>(in.grad, p);
    by_type<kS>(in.student.type, [&]<typename E>(E*) {
      repeat<kClasses>([&](auto index) {
        constexpr int i = decltype(index)::value;
        struct alignas(kS * kPixels) {
          E lane[kPixels];
        } run;
#pragma unroll
        for (int v = 0; v < kPixels; ++v) run.lane[v] = static_cast<E>(g[v][i]);
        if (i < sure_classes(kClasses) || i < p.classes) {
          store_once(stepped<i>(base, in.grad.step), std::bit_cast<Words<kS * kPixels>>(run));
        }
      });
    });
  }

  // Class j (of all) of the thread's pixel v.
  template <int kSize>
  static DSCT_DEVICE unsigned char* at(const LogitMap& net, const Place& p, int v, int j) {
    return net.data + p.image * net.image + j * static_cast<uint64_t>(net.step) + (p.start + p.at + v) * kSize;
  }
  template <int kSize>
  static DSCT_DEVICE float number(const LogitMap& net, FloatType type, const Place& p, int v, int j) {
    float z = 0;
    by_type<kSize>(type, [&]<typename E>(E*) { z = *reinterpret_cast<E*>(at<kSize>(net, p, v, j)); });
    return z;
  }
  static DSCT_DEVICE float student(const Logits& in, const Place& p, unsigned char*, int v, int j) {
    return number<kS>(in.student, in.student.type, p, v, j);
  }
  static DSCT_DEVICE float teacher(const Logits& in, const Place& p, unsigned char*, int v, int j) {
    return number<kT>(in.teacher, teacher_type(in), p, v, j);
  }
  static DSCT_DEVICE void store_at(const Logits& in, const Place& p, unsigned char*, int v, int j, float g) {
    by_type<kS>(in.student.type,
                [&]<typename E>(E*) { *reinterpret_cast<E*>(at<kS>(in.grad, p, v, j)) = static_cast<E>(g); });
  }
};

}  // namespace dsct::cuda
