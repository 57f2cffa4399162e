// Calls one kernel for a test that cannot load it, as one built for another processor and run by an emulator.
//
// Standard input: the kernel's name, then its arguments, each a letter and its value: i an int64, f a float, p a buffer
// (its size in bytes, then its bytes), 0 no buffer. Standard output: all buffers after the call.

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels.h"
#include "quantized.h"

struct Argument {
    int64_t integer = 0;
    float real = 0;
    std::vector<char> buffer;
    bool is_buffer = false;

    void* data() { return is_buffer ? buffer.data() : nullptr; }
};

template <typename T>
T value() {
    T read{};
    if (std::fread(&read, sizeof read, 1, stdin) != 1) std::fprintf(stderr, "cut short\n");
    return read;
}

int main() {
    std::string name;
    for (int letter = std::getchar(); letter != '\n' && letter != EOF; letter = std::getchar()) name += char(letter);
    std::vector<Argument> a;
    for (int letter = std::getchar(); letter != EOF; letter = std::getchar()) {
        Argument& next = a.emplace_back();
        if (letter == 'i') next.integer = value<int64_t>();
        if (letter == 'f') next.real = value<float>();
        if (letter == 'p') {
            next.is_buffer = true;
            next.buffer.resize(value<int64_t>());
            if (std::fread(next.buffer.data(), 1, next.buffer.size(), stdin) != next.buffer.size()) return 1;
        }
    }
    const bool is_half = name.find("bfloat16") != std::string::npos;
    if (name == "space_pack")
        space_pack(a[0].integer, a[1].data(), static_cast<const int64_t*>(a[2].data()), a[3].data(), a[4].integer,
                   a[5].integer);
    else if (name == "space_linear_quantized") {
        a.resize(14);  // an update, or none
        const SpaceUpdate update{a[8].data(),  a[9].data(),   static_cast<const int64_t*>(a[10].data()),
                                 a[11].integer, a[12].integer, a[13].integer};
        space_linear_quantized(a[0].integer, static_cast<const float*>(a[1].data()), a[2].data(),
                               static_cast<const float*>(a[3].data()), static_cast<float*>(a[4].data()), a[5].integer,
                               a[6].integer, a[7].integer, update.down ? &update : nullptr);
    } else if (name == "space_rows_quantized")
        space_rows_quantized(a[0].integer, static_cast<const int64_t*>(a[1].data()), a[2].data(),
                             static_cast<float*>(a[3].data()), a[4].integer, a[5].integer);
    else if (name.starts_with("space_linear"))
        (is_half ? space_linear_bfloat16 : space_linear_float32)(a[0].data(), a[1].data(), a[2].data(), a[3].data(),
                                                                 a[4].integer, a[5].integer, a[6].integer);
    else if (name.starts_with("space_likely"))
        (is_half ? space_likely_bfloat16 : space_likely_float32)(a[0].data(), static_cast<int64_t*>(a[1].data()),
                                                                 static_cast<float*>(a[2].data()), a[3].integer,
                                                                 a[4].integer);
    else
        (is_half ? space_attend_bfloat16 : space_attend_float32)(
            a[0].data(), a[1].integer, a[2].integer, a[3].data(), a[4].integer, a[5].integer, a[6].data(), a[7].integer,
            a[8].integer, a[9].data(), a[10].data(), a[11].data(), static_cast<const int32_t*>(a[12].data()),
            a[13].integer, a[14].integer, a[15].integer, a[16].integer, a[17].integer, a[18].integer, a[19].integer,
            a[20].real);
    for (Argument& each : a)
        if (each.is_buffer) std::fwrite(each.buffer.data(), 1, each.buffer.size(), stdout);
}
