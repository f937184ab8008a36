// Reads settings: lines of words, from the environment once and from the control file whenever it changes. README.md lists them.
#include "control.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "call.h"
#include "errors.h"

namespace fake {
namespace {

// `fail NAME NTH ERROR [TIMES|always]`, counted down as the calls come. `fault` is the same for work, under the name "".
struct Failure {
    std::string name;
    uint64_t n_before = 0;
    uint64_t n_left = 0;
    CUresult error = CUDA_SUCCESS;
};

// What stood in the environment or in the file, and what of it is still to come.
struct Instructions {
    std::vector<std::vector<std::string>> lines;
    std::vector<Failure> failures;
};

struct Control {
    Settings settings;
    Instructions from_environment, from_file;
    bool was_read = false;
    const char* path = nullptr;
    // The file's text with the marks of its last change.
    std::string seen;
};

Control& control() {
    static Control* const the_control = new Control;
    return *the_control;
}

bool is_function(const std::string& name) {
    Dl_info self;
    if (!dladdr(reinterpret_cast<void*>(&is_function), &self)) return true;
    void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return true;
    const bool is_known = dlsym(library, name.c_str()) != nullptr;
    dlclose(library);
    return is_known;
}

bool read_number(const std::string& word, uint64_t* number) {
    if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) return false;
    *number = std::strtoull(word.c_str(), nullptr, 10);
    return true;
}

bool read_switch(const std::string& word, bool* is_on) {
    *is_on = word == "on";
    return word == "on" || word == "off";
}

bool read_failure(const std::vector<std::string>& words, Instructions* into) {
    // `fault` has no function to name.
    const bool is_work = words[0] == "fault";
    const size_t at = is_work ? 1 : 2;
    if (words.size() < at + 2 || words.size() > at + 3) return false;
    Failure failure;
    failure.name = is_work ? "" : words[1];
    uint64_t nth = 0, error = 0;
    if (!read_number(words[at], &nth) || nth == 0) return false;
    // Known ones alone: to a Rust program, an error is an enum, which must not hold another.
    if (read_number(words[at + 1], &error)) {
        failure.error = CUresult(error);
        if (error > 999 || !error_name(failure.error)) return false;
    } else if (!error_number(words[at + 1].c_str(), &failure.error)) {
        return false;
    }
    failure.n_before = nth - 1;
    failure.n_left = 1;
    if (words.size() == at + 3 && words[at + 2] == "always")
        failure.n_left = UINT64_MAX;
    else if (words.size() == at + 3 && !read_number(words[at + 2], &failure.n_left))
        return false;
    if (!is_work && !is_function(failure.name)) return false;
    into->failures.push_back(failure);
    return true;
}

// `NAME BYTES [GPU]`
bool read_bytes_of(const std::vector<std::string>& words, uint64_t* all, std::map<int, uint64_t>* one) {
    uint64_t bytes = 0, gpu = 0;
    if (words.size() > 3 || !read_number(words[1], &bytes)) return false;
    if (words.size() == 2) {
        *all = bytes;
        return true;
    }
    if (!read_number(words[2], &gpu)) return false;
    (*one)[int(gpu)] = bytes;
    return true;
}

bool apply(const std::vector<std::string>& words, Settings* s) {
    const std::string& name = words[0];
    if (name == "fail" || name == "fault") return true;  // counted, and so read once, by read_instructions
    if (words.size() < 2) return false;
    if (name == "memory") return read_bytes_of(words, &s->memory_bytes, &s->memory_bytes_of);
    if (name == "used") return read_bytes_of(words, &s->used_bytes, &s->used_bytes_of);
    uint64_t number = 0, second = 0;
    if (name == "compute") {
        if (words.size() != 3 || !read_number(words[1], &number) || !read_number(words[2], &second)) return false;
        s->compute_major = int(number), s->compute_minor = int(second);
        return true;
    }
    if (words.size() != 2) return false;
    if (name == "hold") return read_switch(words[1], &s->is_held);
    if (name == "poison") return read_switch(words[1], &s->poisons);
    if (!read_number(words[1], &number)) return false;
    if (name == "gpus")
        s->n_gpus = int(number);
    else if (name == "context_bytes")
        s->context_bytes = number;
    else if (name == "pinnable")
        s->pinnable_bytes = number;
    else if (name == "driver_version")
        s->driver_version = int(number);
    else if (name == "delay_us")
        s->delay_us = number;
    else
        return false;
    return true;
}

Instructions read_instructions(const std::string& text) {
    Instructions all;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream parts(line.substr(0, line.find('#')));
        const std::vector<std::string> words{std::istream_iterator<std::string>(parts), {}};
        if (words.empty()) continue;
        Settings scratch;
        const bool is_failure = words[0] == "fail" || words[0] == "fault";
        if (is_failure ? read_failure(words, &all) : apply(words, &scratch))
            all.lines.push_back(words);
        else
            violation("the setting `%s` is none of the fake's, see its README.md", line.c_str());
    }
    return all;
}

void read_environment(Control& c) {
    c.was_read = true;
    c.path = std::getenv("FAKE_CUDA_CONTROL");
    const char* text = std::getenv("FAKE_CUDA");
    std::string lines = text ? text : "";
    for (char& it : lines)
        if (it == ';') it = '\n';
    c.from_environment = read_instructions(lines);
}

// The file's text, and beside it what tells one writing of the same text from the next.
std::string look_at_file(const char* path, std::string* text) {
    struct stat file;
    if (!path || stat(path, &file) != 0) return "";
    std::ifstream stream(path);
    text->assign(std::istreambuf_iterator<char>(stream), {});
    std::ostringstream marks;
    marks << file.st_ino << ' ' << file.st_mtim.tv_sec << ' ' << file.st_mtim.tv_nsec << '\n' << *text;
    return marks.str();
}

bool take(std::vector<Failure>& failures, const char* name, CUresult* error) {
    bool is_taken = false;
    for (Failure& it : failures) {
        if (it.name != name || it.n_left == 0) continue;
        if (it.n_before > 0) {
            it.n_before -= 1;
        } else if (!is_taken) {
            it.n_left -= it.n_left == UINT64_MAX ? 0 : 1;
            *error = it.error;
            is_taken = true;
        }
    }
    return is_taken;
}

}  // namespace

const Settings& settings() { return control().settings; }

void refresh_settings() {
    Control& c = control();
    const bool is_first = !c.was_read;
    if (is_first) read_environment(c);
    std::string text;
    const std::string seen = look_at_file(c.path, &text);
    if (!is_first && seen == c.seen) return;
    c.seen = seen;
    c.from_file = read_instructions(text);
    Settings fresh;
    for (const auto& words : c.from_environment.lines) apply(words, &fresh);
    for (const auto& words : c.from_file.lines) apply(words, &fresh);
    c.settings = fresh;
}

bool is_told_to_fail(const char* name, CUresult* error) {
    Control& c = control();
    return take(c.from_environment.failures, name, error) || take(c.from_file.failures, name, error);
}

bool work_is_told_to_fail(CUresult* error) { return is_told_to_fail("", error); }

}  // namespace fake
