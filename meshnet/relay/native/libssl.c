/* Finds OpenSSL. */
#include "libssl.h"

#include <dlfcn.h>
#include <stddef.h>

struct libssl libssl;

const char *libssl_load(void)
{
    void *ssl = dlopen(LIBSSL, RTLD_NOW | RTLD_LOCAL);
    void *crypto = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!ssl || !crypto)
        return "no " LIBSSL " on this machine";
    /* By way of a void **: ISO C has no cast from an object's address to a function's, POSIX has (dlsym(3)). */
#define FUNCTION(library, result, name, parameters)                                                                   \
    if (!(*(void **)&libssl.name = dlsym(library, #name)))                                                            \
        return LIBSSL " has no " #name;
    LIBSSL_FUNCTIONS
#undef FUNCTION
    return NULL;
}
