// Python's lock is free while this stands.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace datasetdm {

// pybind11's own ends the process with an error where Python, before 3.14, ends a daemon thread that wants the lock
// back while the interpreter is shutting down: that unwinds the thread through a destructor. Here it waits for the
// process to end, as it does from 3.14 on.
class ReleasedGil {
public:
    ReleasedGil() : thread_(PyEval_SaveThread()) {}
    ~ReleasedGil() {
        try {
            PyEval_RestoreThread(thread_);
        } catch (...) {
            for (;;) pause();
        }
    }
    ReleasedGil(const ReleasedGil&) = delete;
    ReleasedGil& operator=(const ReleasedGil&) = delete;

private:
    PyThreadState* thread_;
};

}  // namespace datasetdm
