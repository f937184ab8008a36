// Reads PTX word by word; what it does not know, it passes over.
#include "ptx.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fake {
namespace {

bool is_word_char(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '$' || c == '%'; }

// Names, directives and numbers as words, every other character by itself, comments and space not at all.
std::vector<std::string> words_of(const char* at) {
    std::vector<std::string> words;
    while (*at) {
        if (at[0] == '/' && at[1] == '/') {
            while (*at && *at != '\n') at++;
        } else if (at[0] == '/' && at[1] == '*') {
            const char* end = std::strstr(at + 2, "*/");
            at = end ? end + 2 : at + std::strlen(at);
        } else if (std::isspace(static_cast<unsigned char>(*at))) {
            at++;
        } else if (is_word_char(*at)) {
            const char* end = at;
            while (is_word_char(*end)) end++;
            words.emplace_back(at, end);
            at = end;
        } else {
            words.emplace_back(1, *at++);
        }
    }
    return words;
}

// The length of `.u64` and the like; 0: no type.
uint32_t type_bytes(const std::string& word) {
    static const struct {
        const char* name;
        uint32_t bytes;
    } TYPES[] = {{".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2}, {".u16", 2}, {".s16", 2}, {".f16", 2},  {".b32", 4},
                 {".u32", 4}, {".s32", 4}, {".f32", 4}, {".b64", 8}, {".u64", 8}, {".s64", 8}, {".f64", 8}, {".b128", 16}};
    for (const auto& type : TYPES)
        if (word == type.name) return type.bytes;
    return 0;
}

using Words = std::vector<std::string>;

// `.maxntid 256, 1, 1` before the body; `at` stands behind the parameters.
void read_limits(const Words& words, size_t at, Kernel* kernel) {
    for (; at < words.size() && words[at] != "{" && words[at] != ";"; at++) {
        if (words[at] != ".maxntid" && words[at] != ".reqntid") continue;
        kernel->most_threads = 1;
        for (at++; at < words.size(); at += 2) {
            kernel->most_threads *= std::strtoul(words[at].c_str(), nullptr, 10);
            if (at + 1 >= words.size() || words[at + 1] != ",") break;
        }
    }
}

// `.entry NAME`, with `( .param .u64 a, .param .align 4 .b8 b[12] )` if there are parameters; `at` stands on NAME.
bool read_kernel(const Words& words, size_t at, Kernel* kernel) {
    if (at >= words.size()) return false;
    kernel->name = words[at++];
    if (at >= words.size() || words[at] != "(") {
        read_limits(words, at, kernel);
        return true;
    }
    for (at++; at < words.size() && words[at] != ")"; at++) {
        if (words[at] == ".param") kernel->param_bytes.push_back(0);
        if (kernel->param_bytes.empty()) return false;
        uint32_t& bytes = kernel->param_bytes.back();
        // `.ptr .global .align 4` says what an address points to; a number after `[` is a count of elements.
        if (bytes == 0) bytes = type_bytes(words[at]);
        if (words[at] == "[" && at + 1 < words.size()) bytes *= uint32_t(std::strtoul(words[at + 1].c_str(), nullptr, 10));
        if (words[at] == "," && bytes == 0) return false;
    }
    read_limits(words, at, kernel);
    return at < words.size() && (kernel->param_bytes.empty() || kernel->param_bytes.back() > 0);
}

}  // namespace

bool Ptx::parse(const char* text) {
    const Words words = words_of(text);
    if (words.size() < 4 || words[0] != ".version") return false;
    if (std::sscanf(words[1].c_str(), "%d.%d", &version_major, &version_minor) != 2) return false;
    for (size_t i = 2; i + 1 < words.size(); i++) {
        if (words[i] == ".target" && target == 0 && std::sscanf(words[i + 1].c_str(), "sm_%d", &target) != 1) return false;
        if (words[i] != ".entry") continue;
        Kernel kernel;
        if (!read_kernel(words, i + 1, &kernel)) return false;
        kernels[kernel.name] = kernel;
    }
    return target > 0;
}

int Ptx::driver_version_needed() const {
    switch (version_major) {
        case 6: return version_minor < 3 ? 9000 + version_minor * 10 : 10000 + (version_minor - 3) * 10;
        case 7: return 11000 + version_minor * 10;
        case 8: return 12000 + (version_minor < 6 ? version_minor : version_minor + 1) * 10;  // 8.5 stands for 12.5 and 12.6
        default: return version_major < 6 ? 0 : (version_major + 4) * 1000 + version_minor * 10;
    }
}

}  // namespace fake
