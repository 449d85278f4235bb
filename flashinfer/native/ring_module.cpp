#include <nanobind/nanobind.h>
NB_MODULE(_ring, m) { m.attr("probe") = 1; }
