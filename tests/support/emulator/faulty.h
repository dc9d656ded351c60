#pragma once

namespace emulator {

enum Fault { kShift, kStage, kTurn, kTotal, kColumn, kWide };
void faulty(Fault fault, const float* in, float* out, int option);
void faulty_last_block(const float* in, float* parts, unsigned* tickets, float* out, int fenced);
void faulty_launch(unsigned x, unsigned y, unsigned z, int threads, unsigned shared_bytes);

}  // namespace emulator
