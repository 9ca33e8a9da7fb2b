/* The part of OpenSSL 3's public interface that the core uses, found at run time: a build needs no OpenSSL headers, and
 * a wheel runs with whatever libssl.so.3 the machine has. Prototypes and constants as in OpenSSL's manual pages.
 */
#ifndef MESHNET_LIBSSL_H
#define MESHNET_LIBSSL_H

#include <stddef.h>
#include <stdint.h>

typedef struct ssl_ctx_st SSL_CTX;
typedef struct ssl_st SSL;
typedef struct ssl_session_st SSL_SESSION;
typedef struct ssl_method_st SSL_METHOD;
typedef struct ssl_cipher_st SSL_CIPHER;
typedef struct bio_st BIO;
typedef struct bio_method_st BIO_METHOD;
typedef struct x509_st X509;

#define LIBSSL "libssl.so.3"

#define SSL_ERROR_NONE 0
#define SSL_ERROR_SSL 1
#define SSL_ERROR_WANT_READ 2
#define SSL_VERIFY_PEER 0x01
#define SSL_VERIFY_FAIL_IF_NO_PEER_CERT 0x02
#define SSL_FILETYPE_PEM 1
#define SSL_CTRL_MODE 33
#define SSL_CTRL_SET_MIN_PROTO_VERSION 123
#define TLS1_3_VERSION 0x0304
#define SSL_CTRL_SET_SESS_CACHE_SIZE 42
#define SSL_CTRL_SET_TICKET_KEYS 59 /* SSL_CTRL_SET_TLSEXT_TICKET_KEYS */
#define SSL_CTRL_SET_SESS_CACHE_MODE 44
#define SSL_SESS_CACHE_OFF 0
#define SSL_SESS_CACHE_CLIENT_OUTSIDE 0x0301L /* SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL */
#define SSL_MODE_NO_AUTO_CHAIN 0x08L
#define SSL_MODE_RELEASE_BUFFERS 0x10L
#define SSL_OP_NO_TICKET 0x4000
#define SSL_SENT_SHUTDOWN 1
#define SSL_TLSEXT_ERR_OK 0
#define SSL_TLSEXT_ERR_ALERT_FATAL 2
#define BIO_CTRL_FLUSH 11
#define BIO_TYPE_SOURCE_SINK 0x0400
#define BIO_FLAGS_RWS_AND_RETRY 0x0f
#define BIO_FLAGS_RETRY_READ 0x09
#define ERR_REASON_MASK 0x7fffff

typedef int alpn_select(SSL *ssl, const unsigned char **out, unsigned char *out_size, const unsigned char *in,
                        unsigned int in_size, void *argument);

/* FUNCTION(library, result, name, parameters) */
#define LIBSSL_FUNCTIONS                                                                                              \
    FUNCTION(ssl, const SSL_METHOD *, TLS_method, (void))                                                             \
    FUNCTION(ssl, SSL_CTX *, SSL_CTX_new, (const SSL_METHOD *))                                                       \
    FUNCTION(ssl, void, SSL_CTX_free, (SSL_CTX *))                                                                    \
    FUNCTION(ssl, long, SSL_CTX_ctrl, (SSL_CTX *, int, long, void *))                                                 \
    FUNCTION(ssl, uint64_t, SSL_CTX_set_options, (SSL_CTX *, uint64_t))                                               \
    FUNCTION(ssl, void, SSL_CTX_set_verify, (SSL_CTX *, int, void *))                                                 \
    FUNCTION(ssl, int, SSL_CTX_use_certificate_chain_file, (SSL_CTX *, const char *))                                 \
    FUNCTION(ssl, int, SSL_CTX_use_PrivateKey_file, (SSL_CTX *, const char *, int))                                   \
    FUNCTION(ssl, int, SSL_CTX_check_private_key, (const SSL_CTX *))                                                  \
    FUNCTION(ssl, int, SSL_CTX_load_verify_locations, (SSL_CTX *, const char *, const char *))                        \
    FUNCTION(ssl, int, SSL_CTX_set_alpn_protos, (SSL_CTX *, const unsigned char *, unsigned int))                     \
    FUNCTION(ssl, void, SSL_CTX_set_alpn_select_cb, (SSL_CTX *, alpn_select *, void *))                               \
    FUNCTION(ssl, int, SSL_CTX_set_ciphersuites, (SSL_CTX *, const char *))                                           \
    FUNCTION(ssl, int, SSL_CTX_set_num_tickets, (SSL_CTX *, size_t))                                                  \
    FUNCTION(ssl, int, SSL_set_num_tickets, (SSL *, size_t))                                                          \
    FUNCTION(ssl, int, SSL_CTX_set_session_id_context, (SSL_CTX *, const unsigned char *, unsigned int))              \
    FUNCTION(ssl, SSL *, SSL_new, (SSL_CTX *))                                                                        \
    FUNCTION(ssl, void, SSL_free, (SSL *))                                                                            \
    FUNCTION(ssl, int, SSL_free_buffers, (SSL *))                                                                     \
    FUNCTION(ssl, void, SSL_set_shutdown, (SSL *, int))                                                               \
    FUNCTION(ssl, void, SSL_set_bio, (SSL *, BIO *, BIO *))                                                           \
    FUNCTION(ssl, void, SSL_set_connect_state, (SSL *))                                                               \
    FUNCTION(ssl, void, SSL_set_accept_state, (SSL *))                                                                \
    FUNCTION(ssl, int, SSL_do_handshake, (SSL *))                                                                     \
    FUNCTION(ssl, int, SSL_read_ex, (SSL *, void *, size_t, size_t *))                                                \
    FUNCTION(ssl, int, SSL_write_ex, (SSL *, const void *, size_t, size_t *))                                         \
    FUNCTION(ssl, int, SSL_get_error, (const SSL *, int))                                                             \
    FUNCTION(ssl, void, SSL_get0_alpn_selected, (const SSL *, const unsigned char **, unsigned int *))                \
    FUNCTION(ssl, X509 *, SSL_get1_peer_certificate, (const SSL *))                                                   \
    FUNCTION(ssl, long, SSL_get_verify_result, (const SSL *))                                                         \
    FUNCTION(ssl, int, SSL_set_session, (SSL *, SSL_SESSION *))                                                       \
    FUNCTION(ssl, void, SSL_SESSION_free, (SSL_SESSION *))                                                            \
    FUNCTION(ssl, SSL_SESSION *, SSL_SESSION_dup, (const SSL_SESSION *))                                              \
    FUNCTION(ssl, int, SSL_SESSION_up_ref, (SSL_SESSION *))                                                           \
    FUNCTION(ssl, long, SSL_SESSION_get_time, (const SSL_SESSION *))                                                  \
    FUNCTION(ssl, void, SSL_CTX_sess_set_new_cb, (SSL_CTX *, int (*)(SSL *, SSL_SESSION *)))                          \
    FUNCTION(ssl, int, SSL_set_ex_data, (SSL *, int, void *))                                                         \
    FUNCTION(ssl, void *, SSL_get_ex_data, (const SSL *, int))                                                        \
    FUNCTION(ssl, int, SSL_session_reused, (const SSL *))                                                             \
    FUNCTION(ssl, const char *, SSL_get_version, (const SSL *))                                                       \
    FUNCTION(ssl, const SSL_CIPHER *, SSL_get_current_cipher, (const SSL *))                                          \
    FUNCTION(ssl, const char *, SSL_CIPHER_get_name, (const SSL_CIPHER *))                                            \
    FUNCTION(crypto, int, BIO_get_new_index, (void))                                                                  \
    FUNCTION(crypto, BIO_METHOD *, BIO_meth_new, (int, const char *))                                                 \
    FUNCTION(crypto, int, BIO_meth_set_read_ex, (BIO_METHOD *, int (*)(BIO *, char *, size_t, size_t *)))             \
    FUNCTION(crypto, int, BIO_meth_set_write_ex, (BIO_METHOD *, int (*)(BIO *, const char *, size_t, size_t *)))      \
    FUNCTION(crypto, int, BIO_meth_set_ctrl, (BIO_METHOD *, long (*)(BIO *, int, long, void *)))                      \
    FUNCTION(crypto, BIO *, BIO_new, (const BIO_METHOD *))                                                            \
    FUNCTION(crypto, void, BIO_set_data, (BIO *, void *))                                                             \
    FUNCTION(crypto, void *, BIO_get_data, (BIO *))                                                                   \
    FUNCTION(crypto, void, BIO_set_init, (BIO *, int))                                                                \
    FUNCTION(crypto, void, BIO_set_flags, (BIO *, int))                                                               \
    FUNCTION(crypto, void, BIO_clear_flags, (BIO *, int))                                                             \
    FUNCTION(crypto, int, i2d_X509, (const X509 *, unsigned char **))                                                 \
    FUNCTION(crypto, void, CRYPTO_free, (void *, const char *, int)) /* OPENSSL_free */                                \
    FUNCTION(crypto, void, X509_free, (X509 *))                                                                       \
    FUNCTION(crypto, const char *, X509_verify_cert_error_string, (long))                                             \
    FUNCTION(crypto, unsigned long, ERR_get_error, (void))                                                            \
    FUNCTION(crypto, void, ERR_clear_error, (void))                                                                   \
    FUNCTION(crypto, const char *, ERR_reason_error_string, (unsigned long))

/* libssl.SSL_new(...) and so on. */
struct libssl {
#define FUNCTION(library, result, name, parameters) result (*name) parameters;
    LIBSSL_FUNCTIONS
#undef FUNCTION
    BIO_METHOD *bio_method;
};

extern struct libssl libssl;

/* NULL, or why it is not there. */
const char *libssl_load(void);

#endif
