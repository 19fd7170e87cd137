#include "server/chat_messages.h"

#include "server/text_buffer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One message at work.
struct reader {
    struct request_fields *p;
    const cJSON *message;
    cJSON *out;          // what the template gets
    const char *role;
    char name[32];       // "messages[2]"
    size_t n_values;     // of all arguments so far: cJSON takes 80 bytes for each
    struct chat_form form;
    bool has_forms;
};

// Every field we know, sorted. What a client gets from an answer and sends back is among them.
static const char *const known_fields[] = {
    "annotations", "audio", "content", "function_call", "name", "reasoning", "reasoning_content", "refusal", "role",
    "tool_call_id", "tool_calls",
};

// A 400 that names a field of the message: "'messages[2].where' message".
static int refuse(struct reader *m, const char *message, const char *where, ...) __attribute__((format(printf, 3, 4)));
static int refuse(struct reader *m, const char *message, const char *where, ...)
{
    char param[sizeof m->p->error->param], field[64];
    va_list args;
    va_start(args, where);
    vsnprintf(field, sizeof field, where, args);
    va_end(args);
    snprintf(param, sizeof param, "%s%s", m->name, field);
    return fields_invalid(m->p, param, message);
}

static int add(struct reader *m, const char *name, cJSON *value)
{
    if (value && cJSON_AddItemToObjectCS(m->out, name, value)) return 0;
    cJSON_Delete(value);
    return fields_no_memory(m->p);
}

// A string of the message goes to the template as it is.
static int pass_string(struct reader *m, const char *name)
{
    const char *value = NULL;
    if (json_get_string(m->message, name, 0, SIZE_MAX, &value, &m->p->json)) return fields_nested_error(m->p, m->name);
    return value ? add(m, name, cJSON_CreateStringReference(value)) : 0;
}

// ---- content ----

// The text of one part, borrowed.
static int part_text(struct reader *m, const cJSON *part, int i, const char **text)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "type"));
    if (!type) return refuse(m, "must be an object with a \"type\"", ".content[%d]", i);
    bool refusal = !strcmp(type, "refusal") && !strcmp(m->role, "assistant");
    if (strcmp(type, "text") && !refusal) return refuse(m, "is not \"text\": this server takes text alone", ".content[%d].type", i);
    *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, type));
    if (!*text) return refuse(m, "must be a string", ".content[%d].%s", i, type);
    if (cJSON_GetArraySize(part) > 2) return refuse(m, "has a field that is neither \"type\" nor text", ".content[%d]", i);
    return 0;
}

static int join_parts(struct reader *m, const cJSON *parts)
{
    struct text_buffer joined = {0};
    const cJSON *part;
    int i = 0, failed = 0;
    if (!parts->child) return refuse(m, "must not be empty", ".content");
    cJSON_ArrayForEach(part, parts)
    {
        const char *text = NULL;
        if ((failed = part_text(m, part, i, &text))) break;
        if (i++) text_char(&joined, '\n');
        text_string(&joined, text);
    }
    text_append(&joined, "", 1);
    if (!failed) failed = joined.failed ? fields_no_memory(m->p) : add(m, "content", cJSON_CreateString(joined.data));
    text_deinit(&joined);
    return failed;
}

static int read_content(struct reader *m)
{
    const cJSON *content = json_find(m->message, "content");
    const char *refusal = NULL;
    bool assistant = !strcmp(m->role, "assistant");
    if (json_get_string(m->message, "refusal", 0, SIZE_MAX, &refusal, &m->p->json)) return fields_nested_error(m->p, m->name);
    if (refusal && !assistant) return refuse(m, "is of the assistant alone", ".refusal");
    if (!content && refusal) return add(m, "content", cJSON_CreateStringReference(refusal));
    bool calls = cJSON_GetArraySize(json_find(m->message, "tool_calls")) > 0;
    if (!content && assistant && calls) {
        m->has_forms = true;
        return add(m, "content", m->form.no_nulls ? cJSON_CreateString("") : cJSON_CreateNull());
    }
    if (!content) return refuse(m, "is required", ".content");
    if (cJSON_IsString(content)) return add(m, "content", cJSON_CreateStringReference(content->valuestring));
    if (cJSON_IsArray(content)) return join_parts(m, content);
    return refuse(m, "must be a string or a list of text parts", ".content");
}

// ---- tool calls ----

// The next number's text at *at, outside of strings, and *at behind it. JSON that has been parsed.
static const char *next_number(const char **at, size_t *length)
{
    const char *s = *at;
    bool in_string = false;
    for (; *s && (in_string || (*s != '-' && (*s < '0' || *s > '9'))); s++) {
        if (in_string && *s == '\\') s++;
        else if (*s == '"') in_string = !in_string;
    }
    *length = strspn(s, "+-.0123456789eE");
    *at = s + *length;
    return s;
}

// Numbers of a tree that a double or its text would not give back as they came become raw: they stand in the tree in the order
// of the text.
static bool keep_numbers(cJSON *tree, const char **text)
{
    cJSON *item;
    cJSON_ArrayForEach(item, tree)
    {
        if (!keep_numbers(item, text)) return false;
        if (!cJSON_IsNumber(item)) continue;
        size_t length;
        const char *number = next_number(text, &length);
        bool plain = strcspn(number, ".eE") >= length && length < 16;
        if (plain) continue;
        item->valuestring = strndup(number, length);
        if (!item->valuestring) return false;
        item->type = cJSON_Raw;
    }
    return true;
}

// The arguments of call i as an object; the caller frees. They are JSON in a string, or an object already.
static int read_arguments(struct reader *m, const cJSON *arguments, int i, cJSON **out)
{
    struct json_body body;
    struct json_error ignored;
    if (cJSON_IsObject(arguments)) *out = cJSON_CreateObjectReference(arguments->child);
    else if (!cJSON_IsString(arguments)) return refuse(m, "must be a string", ".tool_calls[%d].function.arguments", i);
    else if (!arguments->valuestring[0]) *out = cJSON_CreateObject();
    else if (json_body_init(&body, arguments->valuestring, strlen(arguments->valuestring), NULL, &ignored)) {
        if (ignored.error.code == ERR_NOMEM) return fields_no_memory(m->p);
        return refuse(m, "must be the JSON text of an object", ".tool_calls[%d].function.arguments", i);
    } else {
        const char *text = arguments->valuestring;
        *out = body.root;
        body.root = NULL;
        m->n_values += body.scan.n_values;
        json_body_deinit(&body);
        if (!keep_numbers(*out, &text)) {
            cJSON_Delete(*out);
            *out = NULL;
        }
    }
    if (*out && cJSON_IsString(arguments)) {
        m->has_forms = true;
        if (m->form.text_arguments) {
            cJSON_Delete(*out);
            *out = cJSON_CreateStringReference(arguments->valuestring);
        }
    }
    if (!*out) return fields_no_memory(m->p);
    return m->n_values > JSON_MAX_VALUES ? refuse(m, "hold too many values in their arguments", ".tool_calls") : 0;
}

// {"id", "type", "function": {"name", "arguments"}}
static cJSON *create_call(const cJSON *call, const cJSON *name, cJSON *arguments)
{
    const cJSON *id = cJSON_GetObjectItemCaseSensitive(call, "id");
    cJSON *out = cJSON_CreateObject(), *function = NULL;
    bool made = out && (!cJSON_IsString(id) || cJSON_AddItemToObjectCS(out, "id", cJSON_CreateStringReference(id->valuestring))) &&
                cJSON_AddStringToObject(out, "type", "function") && (function = cJSON_AddObjectToObject(out, "function")) &&
                cJSON_AddItemToObjectCS(function, "name", cJSON_CreateStringReference(name->valuestring)) &&
                cJSON_AddItemToObjectCS(function, "arguments", arguments);
    if (made) return out;
    cJSON_Delete(out);
    return NULL;
}

static int read_call(struct reader *m, const cJSON *call, int i, cJSON *list)
{
    const cJSON *id = json_find(call, "id"), *type = json_find(call, "type"), *function = json_find(call, "function");
    const cJSON *name = cJSON_GetObjectItemCaseSensitive(function, "name");
    cJSON *arguments = NULL;
    if (id && !cJSON_IsString(id)) return refuse(m, "must be a string", ".tool_calls[%d].id", i);
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "function")))
        return refuse(m, "is not \"function\"", ".tool_calls[%d].type", i);
    if (!cJSON_IsObject(function)) return refuse(m, "must be an object", ".tool_calls[%d].function", i);
    if (!cJSON_IsString(name)) return refuse(m, "must be a string", ".tool_calls[%d].function.name", i);
    int failed = read_arguments(m, cJSON_GetObjectItemCaseSensitive(function, "arguments"), i, &arguments);
    cJSON *out = failed ? NULL : create_call(call, name, arguments);
    if (out) {
        cJSON_AddItemToArray(list, out);
        return 0;
    }
    cJSON_Delete(arguments);
    return failed ? failed : fields_no_memory(m->p);
}

static int read_calls(struct reader *m)
{
    const cJSON *calls = json_find(m->message, "tool_calls"), *call;
    if (calls && !cJSON_IsArray(calls)) return refuse(m, "must be a list", ".tool_calls");
    if (!calls || !calls->child) return 0;
    if (strcmp(m->role, "assistant")) return refuse(m, "are of the assistant alone", ".tool_calls");
    cJSON *list = cJSON_CreateArray();
    if (add(m, "tool_calls", list)) return -1;
    int i = 0;
    cJSON_ArrayForEach(call, calls)
        if (read_call(m, call, i++, list)) return -1;
    return 0;
}

// ---- messages ----

static int read_message(struct reader *m)
{
    struct request_fields *p = m->p;
    if (!cJSON_IsObject(m->message)) return refuse(m, "must be an object", "%s", "");
    if (json_check_known(m->message, known_fields, LENGTH(known_fields), &p->json) ||
        json_require(m->message, "role", &p->json) ||
        json_get_string(m->message, "role", 1, SIZE_MAX, &m->role, &p->json))
        return fields_nested_error(p, m->name);
    if (json_find(m->message, "audio")) return refuse(m, "is not supported by this server", ".audio");
    if (json_find(m->message, "function_call")) return refuse(m, "is not supported by this server", ".function_call");
    return add(m, "role", cJSON_CreateStringReference(m->role)) || read_content(m) || pass_string(m, "name") || read_calls(m) ||
                   pass_string(m, "tool_call_id") || pass_string(m, "reasoning") || pass_string(m, "reasoning_content")
               ? -1
               : 0;
}

int chat_messages_read(struct request_fields *p, struct chat_form form, cJSON **out, bool *has_forms)
{
    const cJSON *messages = json_find(p->body.root, "messages");
    struct reader m = {.p = p, .form = form};
    int i = 0;
    *out = NULL;
    if (json_require(p->body.root, "messages", &p->json)) return fields_result(p, -1);
    if (!cJSON_IsArray(messages)) return fields_invalid(p, "messages", "must be a list of messages");
    if (!messages->child) return fields_invalid(p, "messages", "must not be empty");
    cJSON *list = cJSON_CreateArray();
    if (!list) return fields_no_memory(p);
    cJSON_ArrayForEach(m.message, messages)
    {
        snprintf(m.name, sizeof m.name, "messages[%d]", i++);
        m.out = cJSON_CreateObject();
        if (m.out && cJSON_AddItemToArray(list, m.out) && !read_message(&m)) continue;
        cJSON_Delete(list);
        return m.out ? -1 : fields_no_memory(p);
    }
    *out = list;
    if (has_forms) *has_forms = m.has_forms;
    return 0;
}
