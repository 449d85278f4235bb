# Plans of reads and the window policy: what numpy does in many small passes, in one.
flashinfer_module(_bookkeeping bookkeeping_module.cpp bookkeeping_plan.cpp bookkeeping_slots.cpp bookkeeping_heat.cpp
  bookkeeping_tiers.cpp bookkeeping_window.cpp)
