/* chat_messages.h: `messages` of a chat request as its template sees them. Called by chat_request.c.
 *
 * Roles go through as they are. Text parts are joined with line ends, arguments of tool calls are parsed from JSON text to objects,
 * as most templates expect them, and fields that are no template's are left out.
 */
#ifndef GPTD_SERVER_CHAT_MESSAGES_H
#define GPTD_SERVER_CHAT_MESSAGES_H

#include "server/request_fields.h"

// Templates differ in what they take of a history with tool calls.
struct chat_form {
    bool text_arguments; // a call's arguments as the JSON text that came
    bool no_nulls;       // "" for content that is null
};

// *out: a list that borrows from p->body; cJSON_Delete frees it. *has_forms (may be NULL): whether another form would be another
// list. Returns 0, or -1 with the error set ("messages[2].content").
int chat_messages_read(struct request_fields *p, struct chat_form form, cJSON **out, bool *has_forms);

#endif
