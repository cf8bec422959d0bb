// Test-only: Python's view of philox.h and noise.h, and of each lane type's arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <vector>

#include "../csrc/cpu/convert.h"
#include "../csrc/cpu/simd.h"

namespace py = pybind11;
using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// counter [n, 4], n a multiple of 16 -> words [n, 4]
template <class V>
Words philox(Words counter, uint32_t key_lo, uint32_t key_hi) {
  const py::ssize_t n = counter.shape(0);
  Words out({n, py::ssize_t{4}});
  for (py::ssize_t i = 0; i < n; i += V::kLanes) {
    typename V::Wide ctr[4];
    alignas(64) uint32_t lanes[16];
    for (int t = 0; t < 4; ++t) {
      for (int l = 0; l < V::kLanes; ++l) lanes[l] = *counter.data(i + l, t);
      ctr[t] = V::widen(V::load(lanes));
    }
    dip::philox4x32_10<V>(ctr, dip::PhiloxKey{key_lo, key_hi});
    for (int t = 0; t < 4; ++t) {
      const typename V::U word = V::narrow(ctr[t]);
      std::memcpy(lanes, &word, sizeof(word));
      for (int l = 0; l < V::kLanes; ++l) *out.mutable_data(i + l, t) = lanes[l];
    }
  }
  return out;
}

// words [5, lanes] -> what store_words makes of memory [80] full of `filler` and of the first four
template <class V>
Words stored(Words words, uint32_t filler) {
  typename V::U w[5];
  for (int t = 0; t < 5; ++t) w[t] = V::load(words.data(t, 0));
  Words out(py::ssize_t{80});
  for (py::ssize_t i = 0; i < 80; ++i) *out.mutable_data(i) = filler;
  V::store_words(out.mutable_data(0), w);
  return out;
}

// words [n], n a multiple of 16 -> pairs [n, 2]
template <class V>
Floats pairs(Words words) {
  const py::ssize_t n = words.shape(0);
  Floats out({n, py::ssize_t{2}});
  for (py::ssize_t i = 0; i < n; i += V::kLanes) {
    typename V::F even, odd;
    dip::standard_normal_pair<V>(V::load(words.data(i)), &even, &odd);
    alignas(64) float lanes[2][16];
    V::store(lanes[0], even);
    V::store(lanes[1], odd);
    for (int l = 0; l < V::kLanes; ++l)
      for (int side = 0; side < 2; ++side) *out.mutable_data(i + l, side) = lanes[side][l];
  }
  return out;
}

// words [n] -> radius [n]
Floats radius(Words words) {
  Floats out(words.shape(0));
  for (py::ssize_t i = 0; i < words.shape(0); ++i)
    *out.mutable_data(i) = dip::radius<dip::ScalarLane>(*words.data(i));
  return out;
}

// There and back through the library's storage conversions, as bits.
template <class Narrow, class Widen>
py::tuple round_trip(Floats values, Narrow narrow, Widen widen) {
  py::array_t<uint16_t> bits(values.shape(0));
  Floats back(values.shape(0));
  for (py::ssize_t i = 0; i < values.shape(0); ++i) {
    *bits.mutable_data(i) = narrow(*values.data(i));
    *back.mutable_data(i) = widen(*bits.data(i));
  }
  return py::make_tuple(bits, back);
}

PYBIND11_MODULE(DIP_MODULE, m) {
  m.def("philox_portable", &philox<dip::Portable>);
  m.def("pairs_portable", &pairs<dip::Portable>);
  m.def("stored_portable", &stored<dip::Portable>);
#ifdef __AVX2__
  m.def("philox_avx2", &philox<dip::Avx2>);
  m.def("pairs_avx2", &pairs<dip::Avx2>);
  m.def("stored_avx2", &stored<dip::Avx2>);
#endif
#ifdef __AVX512F__
  m.def("philox_avx512", &philox<dip::Avx512>);
  m.def("pairs_avx512", &pairs<dip::Avx512>);
  m.def("stored_avx512", &stored<dip::Avx512>);
#endif
  m.def("radius", &radius);
  m.def("bfloat16", [](Floats v) {
    return round_trip(v, dip::float_to_bfloat16, dip::bfloat16_to_float);
  });
#ifndef __F16C__
  m.def("float16", [](Floats v) {
    return round_trip(v, dip::float_to_float16, dip::float16_to_float);
  });
#endif
}
