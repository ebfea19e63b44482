// The program of a kernel: global memory is a file, at the address that the pointers among the parameters count on.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "scheduler.h"

namespace emulator {

int main(char** arguments, void* parameters, int size, Launch const& launch) {
    int const memory = open(arguments[1], O_RDWR);
    struct stat status = {};
    fstat(memory, &status);
    void* const address = reinterpret_cast<void*>(std::strtoull(arguments[2], nullptr, 0));
    int const flags = MAP_SHARED | MAP_FIXED_NOREPLACE;
    void* const mapped = mmap(address, status.st_size, PROT_READ | PROT_WRITE, flags, memory, 0);
    if (mapped != address || read(open(arguments[3], O_RDONLY), parameters, size) != size) {
        std::perror("no memory or no parameters");
        return 1;
    }
    run(launch, std::atoi(arguments[4]), std::strtoull(arguments[5], nullptr, 0));
    return 0;
}

}  // namespace emulator
