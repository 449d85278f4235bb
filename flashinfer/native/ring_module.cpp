// Python's door to the ring. The GIL is let go before the ring's lock is taken and taken back after it is let go.
#include "ring.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <tuple>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashinfer {
namespace {

using Column = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Address and size of a writable buffer.
std::pair<std::uint8_t *, std::int64_t> memory_of(nb::handle object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS))
    throw nb::python_error();
  const std::pair found(static_cast<std::uint8_t *>(view.buf), static_cast<std::int64_t>(view.len));
  PyBuffer_Release(&view);
  return found;
}

void release_ended(Ring &ring) {
  for (void *keep : ring.take_ended())
    Py_DECREF(static_cast<PyObject *>(keep));
}

// Calls `step` until it is true; between two calls Python may handle signals, and raise.
template <typename Step> void until_done(Ring &ring, Step &&step) {
  for (;;) {
    bool done;
    {
      nb::gil_scoped_release release;
      done = step();
    }
    release_ended(ring);
    if (done)
      return;
    if (PyErr_CheckSignals())
      throw nb::python_error();
  }
}

void make(Ring *place, const std::vector<std::tuple<int, std::int64_t, bool>> &files, unsigned depth,
          bool timed) {
  std::vector<File> all;
  for (const auto &[fd, alignment, forget] : files)
    all.push_back({fd, alignment, forget});
  new (place) Ring(std::move(all), depth, timed);
}

std::shared_ptr<Batch> submit(Ring &ring, std::size_t file, const Column &offsets, const Column &lengths,
                              const Column &places, nb::handle target) {
  const auto [address, size] = memory_of(target);
  const std::size_t count = offsets.shape(0);
  if (lengths.shape(0) != count || places.shape(0) != count)
    throw nb::value_error("offsets, lengths and targets must have the same length");
  if (file >= ring.n_files)
    throw nb::index_error("no such file");
  const std::int64_t beyond = ring.alignment - 1; // the bits that must be 0
  if (reinterpret_cast<std::uintptr_t>(address) & static_cast<std::uintptr_t>(beyond))
    throw nb::value_error("the buffer's address must be a multiple of the alignment");
  auto batch = std::make_shared<Batch>();
  batch->file = file;
  batch->left = count;
  batch->reads.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t length = lengths(i), place = places(i);
    if (offsets(i) < 0 || length < 1 || place < 0)
      throw nb::value_error("offsets and targets must not be negative, lengths must be positive");
    if ((offsets(i) | length | place) & beyond)
      throw nb::value_error("offsets, lengths and targets must be multiples of the alignment");
    if (length > size || place > size - length)
      throw nb::value_error("an extent ends beyond the target");
    batch->reads.push_back({batch.get(), offsets(i), length, 0, address + place, 0, 0.0});
  }
  batch->keep = target.ptr();
  target.inc_ref(); // until the batch has ended, whatever becomes of those who wait for it
  try {
    nb::gil_scoped_release release;
    ring.submit(batch);
  } catch (...) {
    target.dec_ref();
    throw;
  }
  release_ended(ring);
  return batch;
}

std::optional<std::pair<std::int64_t, int>> wait(Ring &ring, const std::shared_ptr<Batch> &batch) {
  until_done(ring, [&] { return ring.wait(*batch); });
  if (batch->failed < 0)
    return std::nullopt;
  return std::pair<std::int64_t, int>(batch->failed, batch->error);
}

void translate(const std::exception_ptr &caught, void *) {
  try {
    std::rethrow_exception(caught);
  } catch (const std::system_error &error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  }
}

} // namespace
} // namespace flashinfer

NB_MODULE(_ring, m) {
  using namespace flashinfer;
  nb::register_exception_translator(translate);
  nb::class_<Batch>(m, "Batch");
  nb::class_<Ring>(m, "Ring")
      .def("__init__", &make, "files"_a, "depth"_a, "timed"_a = false)
      .def_ro("registered", &Ring::registered)
      .def("submit", &submit, "file"_a, "offsets"_a, "lengths"_a, "targets"_a, "target"_a)
      .def("wait", &wait, "batch"_a)
      .def("close", [](Ring &ring) { until_done(ring, [&] { return ring.close(); }); })
      .def("take_seconds", &Ring::take_seconds, nb::call_guard<nb::gil_scoped_release>())
      .def("fault", &Ring::fault, "file"_a, "offset"_a, "result"_a, "times"_a = 1);
}
