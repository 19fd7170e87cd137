/* server.h: the HTTP server: its life, from options to drained.
 *
 * Called by main.c alone. It borrows the engine, the tokenizer and its template, which must outlive it, and owns its threads: the
 * listener, HTTP (libmicrohttpd's pool), tokenizer workers, notifier, watchdog. Order of a life:
 *
 *   engine_create, server_create, server_start   requests get 503 and /ready says no, /health and /metrics answer
 *   engine_start, server_open                    requests are taken
 *   server_drain                                 on SIGTERM: /ready fails at once, the rest of the drain runs by itself
 *   server_drained (poll it), server_stop, server_destroy, then engine_destroy
 *
 * A socket of its own is closed at the end, clients that are connected by then get a 503: there is another server to go to. A
 * socket that was passed (listen_fd) is left to whoever shares it or comes next: this server accepts nobody before server_open and
 * nobody more as soon as it drains, and answers those who are connected, with the request to connect anew.
 */
#ifndef GPTD_SERVER_SERVER_H
#define GPTD_SERVER_SERVER_H

#include "engine/engine.h"
#include "server/api_keys.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

// Strings and arrays are borrowed and must outlive the server. Times are in seconds. Defaults: options.c.
struct server_options {
    const char *host;                      // address to bind, numeric or a name: "127.0.0.1", "0.0.0.0", "::"
    uint16_t port;                         // 0: any free one, see server_port
    int listen_fd;                         // socket that listens already, and may be listened to by others; 0: none, host
                                           // and port are bound
    struct api_keys *api_keys;             // NULL: no key is asked for
    const char *const *served_model_names; // [n_served_model_names], at least 1; the first stands in answers
    size_t n_served_model_names;
    const char *cors_origin;               // value of Access-Control-Allow-Origin; NULL: no CORS headers
    int32_t http_threads;                  // event loops
    int32_t tokenizer_threads;             // workers for bodies too long for an event loop
    int32_t max_connections;               // more: 503
    size_t max_body_bytes;                 // more: 413
    int32_t max_prompts;                   // prompts in one request
    int32_t max_choices;                   // prompts x best_of in one request
    int64_t max_request_tokens;            // prompts once, max_tokens for each choice, and the prompt again for each
                                           // choice that repeats it (echo, prompt_logprobs, return_token_ids); a token
                                           // with k alternatives counts 1 + k times; 0: 256 contexts
    int32_t max_logprobs;                  // largest `logprobs`, `top_logprobs` and `prompt_logprobs`; the engine's
    double header_timeout;                 // from the request line (a new connection: from accept) to the headers' end
    double body_timeout;                   // from the end of the headers to the end of the body
    double idle_timeout;                   // between requests of one connection
    double request_timeout;                // from the end of the body to the last token; 0: none
    double send_timeout;                   // from the last token to the last byte taken by the client
    double keep_alive_interval;            // silence in a stream before a comment line is sent
    bool log_prompts;                      // bodies of completions and chats go to the log
    double stall_timeout;                  // an engine with work that makes no progress for so long is not healthy
    double drain_delay;                    // how long a draining server goes on accepting
};

struct server;

// Checks the options and binds the port. tokenizer may be NULL: token ids only; chat_template may be: no chat.
int server_create(struct server **out, const struct server_options *options, struct engine *engine,
                  const struct tokenizer *tokenizer, const struct chat_template *chat_template, struct error *e);
// Starts the threads.
int server_start(struct server *s, struct error *e);
// Takes requests from now on. The engine has been started.
int server_open(struct server *s, struct error *e);
uint16_t server_port(const struct server *s);
// Begins to drain and returns: not ready at once; after drain_delay no new connection, 503 on those kept alive. With listen_fd no
// new connection at once, and no 503.
void server_drain(struct server *s);
// Takes the steps of a drain as their time comes; true when nothing is left to wait for. Cheap: call it every few ms.
bool server_drained(struct server *s);
// NULL, or why the engine does no work that it has to do: what /health says.
const char *server_trouble(const struct server *s);
// Ends now: what still runs is cancelled and told so. Blocks until the threads have ended.
void server_stop(struct server *s);
void server_destroy(struct server *s);

#endif
