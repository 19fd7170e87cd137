/* The chat page at "/": one answer, put together from the files of server/page/, which are linked into the program. It
 * holds nothing of anyone's and needs no key; what it shows it gets from the API beside it.
 *
 * Its policy lets it run the one script and the one style that the build has hashed (see the Makefile), talk to its own
 * server, and do nothing else: what a model writes can become neither code nor a request.
 */
#include "server/context.h"

#define POLICY                                                                                                           \
    "default-src 'none'; script-src 'sha256-" GPTD_PAGE_SCRIPT_SHA256 "'; style-src 'sha256-" GPTD_PAGE_STYLE_SHA256     \
    "'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "                \
    "require-trusted-types-for 'script'"

// server/page/NAME, as ld names it.
#define PART(name) extern const char _binary_server_page_##name##_start[], _binary_server_page_##name##_end[]
#define APPEND(out, name)                                                                                                \
    text_append(out, _binary_server_page_##name##_start,                                                                 \
                (size_t)(_binary_server_page_##name##_end - _binary_server_page_##name##_start))
PART(head_html);
PART(style_css);
PART(body_html);
PART(dom_js);
PART(markdown_js);
PART(api_js);
PART(settings_js);
PART(turns_js);
PART(page_js);

// What is hashed is what lies between the tags, byte for byte.
static void write_page(struct text_buffer *out)
{
    APPEND(out, head_html);
    text_string(out, "<style>");
    APPEND(out, style_css);
    text_string(out, "</style>\n");
    APPEND(out, body_html);
    text_string(out, "<script>");
    APPEND(out, dom_js);
    APPEND(out, markdown_js);
    APPEND(out, api_js);
    APPEND(out, settings_js);
    APPEND(out, turns_js);
    APPEND(out, page_js);
    text_string(out, "</script>\n</body>\n</html>\n");
}

enum exchange_next page_handle(struct exchange *x)
{
    struct text_buffer out = {0};
    write_page(&out);
    exchange_header_constant(x, "Content-Security-Policy", POLICY);
    exchange_header(x, "X-Content-Type-Options", "nosniff");
    exchange_header(x, "Referrer-Policy", "no-referrer");
    exchange_header(x, "Cache-Control", "no-cache");
    return exchange_reply(x, 200, "text/html; charset=utf-8", &out);
}
