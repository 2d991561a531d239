// Every FFI target of the package, once: X(name, Symbol).
// JAX knows the target as "dsv4_" name; its handlers are Dsv4##Symbol##Cpu and Dsv4##Symbol##Cuda.
#ifndef DSV4_FFI_TARGETS_H_
#define DSV4_FFI_TARGETS_H_

#define DSV4_TARGETS(X)                   \
  X(begin_step, BeginStep)                \
  X(append_window, AppendWindow)          \
  X(append_tail, AppendTail)              \
  X(compress, Compress)                   \
  X(normalize, Normalize)                 \
  X(flush, Flush)                         \
  X(rotate, Rotate)                       \
  X(gather_entries, GatherEntries)        \
  X(gather_all_entries, GatherAllEntries) \
  X(gather_window, GatherWindow)          \
  X(transfer, Transfer)                   \
  X(update_swa, UpdateSwa)                \
  X(update_csa, UpdateCsa)                \
  X(update_hca, UpdateHca)                \
  X(quantize, Quantize)                   \
  X(dequantize, Dequantize)

#endif  // DSV4_FFI_TARGETS_H_
