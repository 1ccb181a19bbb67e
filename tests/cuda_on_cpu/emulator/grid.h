// Runs launches, block after block.
#pragma once

#include "emulator/device.h"

namespace emulator {

class Block;

// Runs all blocks of a launch. Returns a cudaError_t; findings say more.
int run_grid(const Launch& launch);

Block* current_block();  // null outside a launch
const Launch* current_launch();

// What orders a GPU thread after the host's launch and before what the host does next.
void before_thread();
void after_thread();

}  // namespace emulator
