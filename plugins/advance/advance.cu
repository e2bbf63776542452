// A thread takes a row of a decode step: its token goes where the host and the next step look for it, and its other
// inputs go one token on. Rows of padding (no context) keep their inputs.
// Constants: THREADS.
#include "fp8/sync.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
advance(const int* token, const long long* slots, int* table, int* input_ids, int* position_ids, int* slot_mapping,
        int* sequence_lengths, int* counter, int* stage, int* read, int rows, int stages, int columns) {
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= rows) return;
  griddepcontrol_wait();  // the kernels before have read the inputs, and the sampler has written the token
  const int length = sequence_lengths[row], position = position_ids[row], place = slot_mapping[row];
  const int count = counter[row], now = stage[row], sampled = token[row];
  const long long slot = slots[row];
  table[slot] = sampled;
  read[now * columns + row] = sampled;
  stage[row] = now + 1 == stages ? 0 : now + 1;
  if (!length) return;
  input_ids[row] = sampled;
  position_ids[row] = position + 1;
  slot_mapping[row] = place + 1;
  sequence_lengths[row] = length + 1;
  counter[row] = count + 1;
}
