// Stands in for libcurl and libcrypto, which Debian's static libhdf5.a refers to.
//
// The library's read-only S3 driver (H5FDros3.c, H5FDs3comms.c) is the only user of these symbols,
// and it runs only when a caller selects it by H5Pset_fapl_ros3. Cambium opens local files alone
// and links without network code, so each stand-in stops the program: reaching one is a mistake.
#include <stdio.h>
#include <stdlib.h>

static void *no_network(const char *symbol) {
  fprintf(stderr, "cambium: %s called: this binary has no network code\n", symbol);
  abort();
}

// NOTE: only the names matter to the linker; none of these ever returns.
void *curl_easy_init(void) { return no_network("curl_easy_init"); }
void *curl_easy_perform(void) { return no_network("curl_easy_perform"); }
void *curl_easy_setopt(void) { return no_network("curl_easy_setopt"); }
void *curl_easy_getinfo(void) { return no_network("curl_easy_getinfo"); }
void *curl_easy_strerror(void) { return no_network("curl_easy_strerror"); }
void *curl_easy_cleanup(void) { return no_network("curl_easy_cleanup"); }
void *curl_global_init(void) { return no_network("curl_global_init"); }
void *curl_global_cleanup(void) { return no_network("curl_global_cleanup"); }
void *curl_slist_append(void) { return no_network("curl_slist_append"); }
void *curl_slist_free_all(void) { return no_network("curl_slist_free_all"); }
void *EVP_sha256(void) { return no_network("EVP_sha256"); }
void *HMAC(void) { return no_network("HMAC"); }
void *SHA256(void) { return no_network("SHA256"); }
