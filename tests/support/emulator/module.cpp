// What a build for the CPU has besides csrc/cuda/bind.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"
#include "faulty.h"

namespace py = pybind11;

namespace emulator {

#if defined(RAPIDIN_WATCH)
namespace {

void bind_counts(py::module_& m) {
    using watch::Launch;
    using watch::Site;
    py::class_<Site>(m, "Site")
        .def_readonly("place", &Site::place)
        .def_property_readonly("kind", [](const Site& site) { return static_cast<int>(site.kind); })
        .def_readonly("shared", &Site::shared)
        .def_readonly("bytes", &Site::bytes)
        .def_readonly("requests", &Site::requests)
        .def_readonly("lanes", &Site::lanes)
        .def_readonly("turns", &Site::turns)
        .def_readonly("least", &Site::least);
    py::class_<Launch>(m, "Launch")
        .def_readonly("name", &Launch::name)
        .def_property_readonly("blocks", [](const Launch& launch) { return uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2]; })
        .def_readonly("threads", &Launch::threads)
        .def_readonly("shared_bytes", &Launch::shared_bytes)
        .def_readonly("barriers", &Launch::barriers)
        .def_readonly("exchanges", &Launch::exchanges)
        .def_readonly("products", &Launch::products)
        .def_readonly("sectors_read", &Launch::sectors_read)
        .def_readonly("sectors_written", &Launch::sectors_written)
        .def_readonly("sectors_of_blocks", &Launch::sectors_of_blocks)
        .def_readonly("sites", &Launch::sites);
    m.def("count", &watch::count, "Whether launches are counted from now on; forgets what was.");
    m.def("counted", &watch::counted, "The launches since.");
    m.def("launched", &watch::launched, "The names of the kernels launched since it was asked last.");
}

template <class T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_faulty(py::module_& m) {
    const auto bind = [&m](const char* name, Fault fault) {
        m.def(name, [fault](uint64_t in, uint64_t out, int option) { faulty(fault, at<const float>(in), at<float>(out), option); });
    };
    bind("faulty_shift", kShift);
    bind("faulty_stage", kStage);
    bind("faulty_turn", kTurn);
    bind("faulty_total", kTotal);
    bind("faulty_column", kColumn);
    bind("faulty_wide", kWide);
    m.def("faulty_launch", &faulty_launch);
    m.def("faulty_last_block", [](uint64_t in, uint64_t parts, uint64_t tickets, uint64_t out, int fenced) {
        faulty_last_block(at<const float>(in), at<float>(parts), at<unsigned>(tickets), at<float>(out), fenced);
    });
}

}  // namespace
#endif

void bind(py::module_& m) {
    m.def("set_order", &set_order, "Order in which a block's threads run: 0, 1 or 2.");
    m.def("set_arch", &set_arch, "The architecture whose limits launches are held to: 75, 80, 86, 89, 90 or 100.");
    m.def("set_checked_only", &set_checked_only, "Whether launches are held to the limits and then not run.");
#if defined(RAPIDIN_WATCH)
    bind_counts(m);
    bind_faulty(m);
#endif
}

}  // namespace emulator
