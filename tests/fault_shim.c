// Preloaded into a process under test: counts the calls that change files below one folder, and lets one of them, or all from one on, fail,
// fall short, or be the last thing the process does. It sees SQLite's calls as well as Python's. It can also write down what every call did.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum Kind { NOTHING, FULL, BROKEN, SHORT, UNSYNCED, KILL_BEFORE, KILL_AFTER };
enum Call { OPEN = 'o', WRITE = 'w', SYNC = 's', TRUNCATE = 't', RENAME = 'r', UNLINK = 'u', MAKE = 'm', MARK = 'k' };

static char folder[PATH_MAX];
static size_t folder_length;
static int kind, is_lasting, recorder = -1;
static int64_t place;
static atomic_int_fast64_t seen;
static char* paths[4096];  // of the descriptors that are open below the folder

static int applies(enum Call call) {
    switch (kind) {
        case FULL: return call == OPEN || call == WRITE || call == RENAME || call == MAKE || call == TRUNCATE;
        case SHORT: return call == WRITE;
        case UNSYNCED: return call == SYNC;
        default: return 1;
    }
}

static int is_inside(const char* path) { return folder_length && path && strncmp(path, folder, folder_length) == 0; }

static const char* path_of(int handle) { return handle >= 0 && handle < 4096 ? paths[handle] : NULL; }

// 0: go ahead; 1: fail with errno set; 2: write half; 3: go ahead and die
static int meet(enum Call call) {
    if (kind == NOTHING || !applies(call)) {
        return 0;
    }
    const int64_t count = atomic_fetch_add(&seen, 1);
    if (!(count == place || (is_lasting && count > place))) return 0;
    if (kind == KILL_BEFORE) raise(SIGKILL);
    if (kind == KILL_AFTER) return 3;
    if (kind == SHORT) return 2;
    errno = kind == FULL ? ENOSPC : EIO;
    return 1;
}

static void finish(int met) {
    if (met == 3) raise(SIGKILL);
}

static ssize_t (*real_write)(int, const void*, size_t);

static void put(const void* data, size_t size) {
    if (real_write(recorder, data, size) != (ssize_t)size) abort();
}

static void put_text(const char* text) {
    const uint32_t length = text ? strlen(text) : 0;
    put(&length, sizeof length);
    put(text, length);
}

// What a call did, written down: its letter, two names, an offset, bytes.
static void record(enum Call call, const char* path, const char* other, int64_t offset, const void* data, uint32_t size) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // files are written by several threads, and a record is several writes
    if (recorder < 0) return;
    pthread_mutex_lock(&lock);
    const char letter = call;
    put(&letter, 1);
    put_text(path);
    put_text(other);
    put(&offset, sizeof offset);
    put(&size, sizeof size);
    if (size) put(data, size);
    pthread_mutex_unlock(&lock);
}

// Armed by the child that is about to run: which calls below `below`, where, once or for good.
void fault_arm(const char* below, int what, int64_t at, int lasting) {
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    kind = what;
    place = at;
    is_lasting = lasting;
    atomic_store(&seen, 0);
}

int64_t fault_seen(void) { return atomic_load(&seen); }

void fault_record(int handle) { recorder = handle; }

void fault_mark(int64_t number) { record(MARK, "", "", number, NULL, 0); }

__attribute__((constructor)) static void prepare(void) { real_write = dlsym(RTLD_NEXT, "write"); }

#define REAL(name, type, ...)                                     \
    static type (*real)(__VA_ARGS__);                             \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

static int opened(int handle, const char* path, int flags, int existed, int met) {
    if (handle >= 0 && handle < 4096 && is_inside(path)) {
        free(paths[handle]);
        paths[handle] = strdup(path);
        if ((flags & O_CREAT) && !existed) record(OPEN, path, "", 0, NULL, 0);
        if (existed && (flags & O_TRUNC)) record(TRUNCATE, path, "", 0, NULL, 0);
    }
    finish(met);
    return handle;
}

#define DEFINE_OPEN(name)                                                     \
    int name(const char* path, int flags, ...) {                              \
        REAL(#name, int, const char*, int, mode_t)                            \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        const mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                         \
        int met = 0, existed = 1;                                             \
        if (is_inside(path) && (flags & O_CREAT)) {                           \
            existed = access(path, F_OK) == 0;                                \
            met = meet(OPEN);                                                 \
            if (met == 1) return -1;                                          \
        }                                                                     \
        return opened(real(path, flags, mode), path, flags, existed, met);    \
    }

DEFINE_OPEN(open)
DEFINE_OPEN(open64)

int close(int handle) {
    REAL("close", int, int)
    if (handle >= 0 && handle < 4096 && paths[handle]) {
        free(paths[handle]);
        paths[handle] = NULL;
    }
    return real(handle);
}

ssize_t write(int handle, const void* data, size_t size) {
    const char* path = path_of(handle);
    if (!path) return real_write(handle, data, size);
    const int met = meet(WRITE);
    if (met == 1) return -1;
    const int64_t offset = lseek(handle, 0, SEEK_CUR);
    const ssize_t count = real_write(handle, data, met == 2 && size > 1 ? size / 2 : size);
    if (count > 0) record(WRITE, path, "", offset, data, count);
    finish(met);
    return count;
}

#define DEFINE_PWRITE(name)                                                             \
    ssize_t name(int handle, const void* data, size_t size, off_t offset) {             \
        REAL(#name, ssize_t, int, const void*, size_t, off_t)                           \
        const char* path = path_of(handle);                                             \
        if (!path) return real(handle, data, size, offset);                             \
        const int met = meet(WRITE);                                                    \
        if (met == 1) return -1;                                                        \
        const ssize_t count = real(handle, data, met == 2 && size > 1 ? size / 2 : size, offset); \
        if (count > 0) record(WRITE, path, "", offset, data, count);                    \
        finish(met);                                                                    \
        return count;                                                                   \
    }

DEFINE_PWRITE(pwrite)
DEFINE_PWRITE(pwrite64)

#define DEFINE_SYNC(name)                                    \
    int name(int handle) {                                   \
        REAL(#name, int, int)                                \
        const char* path = path_of(handle);                  \
        if (!path) return real(handle);                      \
        const int met = meet(SYNC);                          \
        if (met == 1) return -1;                             \
        record(SYNC, path, "", 0, NULL, 0); /* a killed process loses nothing by it, and a thousand runs are faster without the disk */ \
        finish(met);                                         \
        return 0;                                            \
    }

DEFINE_SYNC(fsync)
DEFINE_SYNC(fdatasync)

#define DEFINE_TRUNCATE(name)                                \
    int name(int handle, off_t size) {                       \
        REAL(#name, int, int, off_t)                         \
        const char* path = path_of(handle);                  \
        if (!path) return real(handle, size);                \
        const int met = meet(TRUNCATE);                      \
        if (met == 1) return -1;                             \
        const int result = real(handle, size);               \
        if (!result) record(TRUNCATE, path, "", size, NULL, 0); \
        finish(met);                                         \
        return result;                                       \
    }

DEFINE_TRUNCATE(ftruncate)
DEFINE_TRUNCATE(ftruncate64)

int rename(const char* from, const char* to) {
    REAL("rename", int, const char*, const char*)
    if (!is_inside(to)) return real(from, to);
    const int met = meet(RENAME);
    if (met == 1) return -1;
    const int result = real(from, to);
    if (!result) record(RENAME, from, to, 0, NULL, 0);
    finish(met);
    return result;
}

int unlink(const char* path) {
    REAL("unlink", int, const char*)
    if (!is_inside(path)) return real(path);
    const int met = meet(UNLINK);
    if (met == 1) return -1;
    const int result = real(path);
    if (!result) record(UNLINK, path, "", 0, NULL, 0);
    finish(met);
    return result;
}

int mkdir(const char* path, mode_t mode) {
    REAL("mkdir", int, const char*, mode_t)
    if (!is_inside(path)) return real(path, mode);
    const int met = meet(MAKE);
    if (met == 1) return -1;
    const int result = real(path, mode);
    if (!result) record(MAKE, path, "", 0, NULL, 0);
    finish(met);
    return result;
}
