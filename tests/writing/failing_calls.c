/* Calls of the operating system that fail, or kill the process, at a chosen position: for LD_PRELOAD.

   Counted are the calls that change what lies under one folder. fail_at(root, at, error, signal, lasting) arms it:
   the call number `at` fails with `error`, or raises `signal` before it is made. With `lasting`, every later call that
   needs space fails as well, as on a full disk. n_calls() and failed_call() say what happened. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define N_FILES 65536
enum { OUTSIDE, READ, WRITTEN };

static char root[4096], failed[256];
static size_t n_root;
static long at;
static int error_number, signal_number, is_lasting;
static _Atomic long counted;
static _Atomic char state[N_FILES];

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void fail_at(const char *folder, long position, int error, int signal, int lasting) {
    snprintf(root, sizeof root, "%s", folder);
    n_root = strlen(root);
    counted = 0;
    failed[0] = 0;
    at = position;
    error_number = error;
    signal_number = signal;
    is_lasting = lasting;
}
long n_calls(void) { return counted; }
const char *failed_call(void) { return failed; }

static int inside(int folder, const char *path) {
    if (!n_root || !path) return 0;
    if (path[0] != '/' && folder >= 0 && folder < N_FILES) return state[folder] != OUTSIDE;
    return strncmp(path, root, n_root) == 0;
}

static int fails_file(const char *name, int fd, int grows);

static int fails(const char *name, const char *path, int grows) {
    long n = ++counted;
    if (!at || n < at) return 0;
    if (n > at && !(is_lasting && grows)) return 0;
    if (n == at) {
        snprintf(failed, sizeof failed, "%s %s", name, path ? path : "");
        if (signal_number) raise(signal_number);
    }
    if (!error_number) return 0;
    errno = error_number;
    return 1;
}

static int fails_file(const char *name, int fd, int grows) {
    char link[64], path[4096] = "";
    if (at && counted + 1 == at) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, path, sizeof path - 1);
        path[n < 0 ? 0 : n] = 0;
    }
    return fails(name, path, grows);
}

static int opened(int fd, int flags) {
    if (fd >= 0 && fd < N_FILES) state[fd] = (flags & O_ACCMODE) == O_RDONLY ? READ : WRITTEN;
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (!inside(-1, path)) return real(path, flags, mode); \
        if ((flags & (O_CREAT | O_TRUNC)) && fails("open", path, 1)) return -1; \
        return opened(real(path, flags, mode), flags); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (!inside(folder, path)) return real(folder, path, flags, mode); \
        if ((flags & (O_CREAT | O_TRUNC)) && fails("open", path, 1)) return -1; \
        return opened(real(folder, path, flags, mode), flags); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

static int is_written(int fd) { return n_root && fd >= 0 && fd < N_FILES && state[fd] == WRITTEN; }
static int is_inside(int fd) { return n_root && fd >= 0 && fd < N_FILES && state[fd] != OUTSIDE; }

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    return is_written(fd) && fails_file("write", fd, 1) ? -1 : real(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *data, int n) {
    REAL(writev);
    return is_written(fd) && fails_file("write", fd, 1) ? -1 : real(fd, data, n);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
    REAL(pwrite);
    return is_written(fd) && fails_file("write", fd, 1) ? -1 : real(fd, data, n, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
    REAL(pwrite64);
    return is_written(fd) && fails_file("write", fd, 1) ? -1 : real(fd, data, n, offset);
}
int ftruncate(int fd, off_t n) { REAL(ftruncate); return is_written(fd) && fails_file("truncate", fd, 0) ? -1 : real(fd, n); }
int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    return is_written(fd) && fails_file("truncate", fd, 0) ? -1 : real(fd, n);
}
int fsync(int fd) {
    REAL(fsync);
    if (!is_inside(fd)) return real(fd);
    return fails_file("fsync", fd, 1) ? -1 : 0; /* these files need not last */
}
int fdatasync(int fd) { return fsync(fd); }
int close(int fd) {
    REAL(close);
    int watched = is_written(fd);
    if (fd >= 0 && fd < N_FILES) state[fd] = OUTSIDE;
    if (watched && fails_file("close", fd, 0)) {
        int error = errno;
        real(fd);
        errno = error;
        return -1;
    }
    return real(fd);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return (inside(-1, to) || inside(-1, from)) && fails("rename", to, 1) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return (inside(b, to) || inside(a, from)) && fails("rename", to, 1) ? -1 : real(a, from, b, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    return inside(-1, to) && fails("link", to, 1) ? -1 : real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat);
    return inside(b, to) && fails("link", to, 1) ? -1 : real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return inside(-1, path) && fails("mkdir", path, 1) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return inside(folder, path) && fails("mkdir", path, 1) ? -1 : real(folder, path, mode);
}
int unlink(const char *path) { REAL(unlink); return inside(-1, path) && fails("unlink", path, 0) ? -1 : real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return inside(folder, path) && fails("unlink", path, 0) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) { REAL(rmdir); return inside(-1, path) && fails("unlink", path, 0) ? -1 : real(path); }
