#include "report.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "block.h"

namespace emulator {

namespace {

void print(char const* format, va_list values) {
    if (current != nullptr)
        std::fprintf(stderr, "block %d warp %d lane %d: ", current->block->index, current->index / 32, current->lane());
    std::vfprintf(stderr, format, values);
    std::fputc('\n', stderr);
}

// "folder/file:12 (discriminator 3)" without folder and remark, if it is a line of a kernel and not of a wrapper.
std::string line_of_kernel(std::string line) {
    if (line.find("/kernels/") == line.npos || line.find("/ptx/") != line.npos) return "";
    line.erase(line.find_first_of(" \n"));
    return line.substr(line.rfind('/') + 1);
}

}  // namespace

Stack stack_of(Thread const& thread) {
    Stack stack;
    auto frame = static_cast<Place const*>(__builtin_frame_address(0));
    if (&thread != current) {
        auto const saved = static_cast<Place const*>(thread.stack_pointer);  // as switch_stacks leaves them
        frame = static_cast<Place const*>(saved[5]);
        stack.push_back(saved[6]);
    }
    while (frame != nullptr && frame[1] != nullptr) {
        stack.push_back(frame[1]);
        frame = static_cast<Place const*>(frame[0]);
    }
    return stack;
}

std::string lines_of(Stack const& stack) {
    static std::map<Stack, std::string> known;
    if (known.contains(stack)) return known[stack];
    std::string command = "addr2line -i -e /proc/" + std::to_string(getpid()) + "/exe";
    for (Place place : stack) {
        char address[32];
        std::snprintf(address, sizeof address, " %p", static_cast<void const*>(static_cast<char const*>(place) - 1));
        command += address;
    }
    std::FILE* const answer = popen((command + " 2>/dev/null").c_str(), "r");
    if (answer == nullptr) return "?";
    std::string lines;
    for (char line[1024]; std::fgets(line, sizeof line, answer) != nullptr;) {
        std::string const found = line_of_kernel(line);
        if (!found.empty()) lines += (lines.empty() ? "" : " < ") + found;
    }
    pclose(answer);
    return known[stack] = lines.empty() ? "?" : lines;
}

void trace(char const* format, ...) {
    static bool const is_on = std::getenv("EMULATOR_TRACE") != nullptr;
    if (!is_on || (current != nullptr && current->lane() != 0)) return;
    va_list values;
    va_start(values, format);
    print(format, values);
    va_end(values);
}

void error(char const* format, ...) {
    std::fputs("error: ", stderr);
    va_list values;
    va_start(values, format);
    print(format, values);
    va_end(values);
    if (current != nullptr) std::fprintf(stderr, "  at %s\n", lines_of(stack_of(*current)).c_str());
    std::_Exit(2);
}

}  // namespace emulator
