// What a run says: its first error, and all that happens if EMULATOR_TRACE is set.
#pragma once
#include <string>
#include <vector>

namespace emulator {

struct Thread;

// An instruction of a kernel, by the address that a call from it returns to.
using Place = void const*;
#define EMULATOR_CALLER __builtin_return_address(0)
// Where a thread is, innermost call first.
using Stack = std::vector<Place>;

Stack stack_of(Thread const& thread);
// The lines of the kernels that belong to it.
std::string lines_of(Stack const& stack);
inline std::string line_of(Place place) { return lines_of({place}); }

[[gnu::format(printf, 1, 2)]] void trace(char const* format, ...);

}  // namespace emulator
