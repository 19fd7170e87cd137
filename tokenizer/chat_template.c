#include "tokenizer/chat_template.h"

#include "tokenizer/detokenizer.h"
#include "tokenizer/fail.h"
#include "tokenizer/jinja.h"
#include "tokenizer/read_file.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_BROKEN = 512 };

struct chat_template {
    struct jinja_template *jinja; // NULL: broken
    cJSON *special_tokens;        // an object: name to text
    char broken[MAX_BROKEN];      // why
};

#define LENGTH(array) (sizeof(array) / sizeof *(array))

static const char *const token_names[] = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
};

// What chat_conversation sets, or what never comes from a request.
static const char *const reserved_names[] = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
};

// Comes behind the last message's content, for the rendered text to be cut there. The space tells whether the template trims.
static const char end_mark[] = "GptdTheMessageGoesOn ";

// ---- files ----

// *json is NULL where there is no such file.
static int read_json(const char *dir, const char *name, cJSON **json, char *error, size_t error_size)
{
    char *text;
    size_t size;
    *json = NULL;
    int result = read_file(dir, name, &text, &size, error, error_size);
    if (result) return result == READ_FILE_ABSENT ? 0 : -1;
    if (utf8_valid(text, size)) *json = cJSON_ParseWithLengthOpts(text, size + 1, NULL, true);
    free(text);
    return cJSON_IsObject(*json) ? 0 : fail(error, error_size, "%s/%s: not a JSON object in UTF-8", dir, name);
}

// A token is given as its text, or described: {"content": text}.
static const char *token_text(const cJSON *entry)
{
    return cJSON_GetStringValue(cJSON_IsObject(entry) ? cJSON_GetObjectItemCaseSensitive(entry, "content") : entry);
}

static int set_token(cJSON *tokens, const char *name, const char *text)
{
    if (!text || cJSON_GetObjectItemCaseSensitive(tokens, name)) return 0;
    return cJSON_AddStringToObject(tokens, name, text) ? 0 : -1;
}

// Adds the special tokens of config, which may be NULL, that are not there yet.
static int add_tokens(cJSON *tokens, const cJSON *config)
{
    const cJSON *entry, *extra = cJSON_GetObjectItemCaseSensitive(config, "extra_special_tokens");
    const cJSON *more = cJSON_GetObjectItemCaseSensitive(config, "additional_special_tokens");
    for (size_t i = 0; i < LENGTH(token_names); i++)
        if (set_token(tokens, token_names[i], token_text(cJSON_GetObjectItemCaseSensitive(config, token_names[i])))) return -1;
    if (cJSON_IsObject(extra))
        cJSON_ArrayForEach(entry, extra)
            if (set_token(tokens, entry->string, token_text(entry))) return -1;
    if (!cJSON_IsArray(more) || cJSON_GetObjectItemCaseSensitive(tokens, more->string)) return 0;
    cJSON *list = cJSON_AddArrayToObject(tokens, more->string);
    if (!list) return -1;
    cJSON_ArrayForEach(entry, more)
    {
        const char *text = token_text(entry);
        if (text && !cJSON_AddItemToArray(list, cJSON_CreateString(text))) return -1;
    }
    return 0;
}

// The template's text in tokenizer_config.json, borrowed. Returns 0, CHAT_TEMPLATE_ABSENT or -1.
static int find_source(const cJSON *config, const char **source, char *error, size_t error_size)
{
    const cJSON *entry, *member = cJSON_GetObjectItemCaseSensitive(config, "chat_template");
    if (!member || cJSON_IsNull(member)) return CHAT_TEMPLATE_ABSENT;
    *source = cJSON_GetStringValue(member);
    if (*source) return 0;
    if (!cJSON_IsArray(member)) return fail(error, error_size, "\"chat_template\" is neither a string nor a list");
    cJSON_ArrayForEach(entry, member)
    {
        const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(entry, "name"));
        *source = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(entry, "template"));
        if (name && *source && !strcmp(name, "default")) return 0;
    }
    return fail(error, error_size, "\"chat_template\" has no template called \"default\"");
}

static int compile(struct chat_template *t, const char *source, size_t length, const char *where, char *error, size_t error_size)
{
    char message[MAX_BROKEN];
    if (!utf8_valid(source, length)) snprintf(message, sizeof message, "not UTF-8");
    else if (!jinja_create(&t->jinja, source, length, message, sizeof message)) return 0;
    return fail(error, error_size, "%s: %s", where, message);
}

// Returns 0, CHAT_TEMPLATE_ABSENT or -1.
static int load(struct chat_template *t, const char *dir, char *error, size_t error_size)
{
    char message[MAX_BROKEN], *text = NULL;
    const char *source;
    size_t size;
    cJSON *config = NULL, *map = NULL;
    int result = read_file(dir, "chat_template.jinja", &text, &size, error, error_size);
    if (result < 0) return -1;
    bool own_file = result == 0;
    result = read_json(dir, "tokenizer_config.json", &config, error, error_size);
    if (!result) result = read_json(dir, "special_tokens_map.json", &map, error, error_size);
    if (!result && (add_tokens(t->special_tokens, config) || add_tokens(t->special_tokens, map)))
        result = fail(error, error_size, "out of memory");
    if (!result && own_file) {
        result = compile(t, text, size, "chat_template.jinja", error, error_size);
    } else if (!result) {
        result = find_source(config, &source, message, sizeof message);
        if (result < 0) fail(error, error_size, "tokenizer_config.json: %s", message);
        if (result == 0) result = compile(t, source, strlen(source), "\"chat_template\"", error, error_size);
    }
    free(text);
    cJSON_Delete(config);
    cJSON_Delete(map);
    return result;
}

int chat_template_create(struct chat_template **out, const char *dir, char *error, size_t error_size)
{
    *out = NULL;
    struct chat_template *t = calloc(1, sizeof *t);
    if (!t || !(t->special_tokens = cJSON_CreateObject())) {
        chat_template_destroy(t);
        return fail(error, error_size, "out of memory");
    }
    int result = load(t, dir, t->broken, sizeof t->broken);
    if (result == CHAT_TEMPLATE_ABSENT) {
        chat_template_destroy(t);
        return result;
    }
    *out = t;
    return result ? fail(error, error_size, "%s", t->broken) : 0;
}

void chat_template_destroy(struct chat_template *t)
{
    if (!t) return;
    jinja_destroy(t->jinja);
    cJSON_Delete(t->special_tokens);
    free(t);
}

// ---- rendering ----

const char *chat_template_reserved(const struct chat_template *t, const cJSON *kwargs)
{
    const cJSON *member;
    cJSON_ArrayForEach(member, kwargs)
    {
        for (size_t i = 0; i < LENGTH(reserved_names); i++)
            if (!strcmp(member->string, reserved_names[i])) return member->string;
        if (cJSON_GetObjectItemCaseSensitive(t->special_tokens, member->string)) return member->string;
    }
    return NULL;
}

// Adds item under name without copying what it holds. (cJSON_AddItemReferenceToObject leaks when memory runs out.)
static bool add_reference(cJSON *object, const char *name, const cJSON *item)
{
    cJSON *reference = cJSON_IsObject(item)   ? cJSON_CreateObjectReference(item->child)
                       : cJSON_IsArray(item)  ? cJSON_CreateArrayReference(item->child)
                       : cJSON_IsString(item) ? cJSON_CreateStringReference(item->valuestring)
                                              : cJSON_Duplicate(item, false);
    if (reference && cJSON_AddItemToObject(object, name, reference)) return true;
    cJSON_Delete(reference);
    return false;
}

// References to the members of from, less the one called `except`.
static bool refer_to_members(cJSON *object, const cJSON *from, const char *except)
{
    const cJSON *member;
    cJSON_ArrayForEach(member, from)
    {
        if (except && !strcmp(member->string, except)) continue;
        if (!add_reference(object, member->string, member)) return false;
    }
    return true;
}

static bool add_marked(cJSON *list, const cJSON *message)
{
    const char *content = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(message, "content"));
    size_t length = strlen(content);
    char *marked = malloc(length + sizeof end_mark);
    cJSON *copy = cJSON_CreateObject();
    bool added = marked && copy && refer_to_members(copy, message, "content");
    if (marked) memcpy(marked, content, length), memcpy(marked + length, end_mark, sizeof end_mark);
    added = added && cJSON_AddStringToObject(copy, "content", marked) && cJSON_AddItemToArray(list, copy);
    if (!added) cJSON_Delete(copy);
    free(marked);
    return added;
}

// The messages, the last one's content with the mark behind it.
static bool add_messages_marked(cJSON *variables, const cJSON *messages)
{
    const cJSON *message;
    cJSON *list = cJSON_AddArrayToObject(variables, "messages");
    if (!list) return false;
    cJSON_ArrayForEach(message, messages)
    {
        bool added = message->next ? cJSON_AddItemReferenceToArray(list, (cJSON *)message) : add_marked(list, message);
        if (!added) return false;
    }
    return true;
}

static bool add_variables(cJSON *variables, const struct chat_template *t, const struct chat_conversation *c)
{
    bool added = c->continue_final_message ? add_messages_marked(variables, c->messages)
                                           : add_reference(variables, "messages", c->messages);
    return added && cJSON_AddNullToObject(variables, "tools") && cJSON_AddNullToObject(variables, "documents") &&
           cJSON_AddBoolToObject(variables, "add_generation_prompt", c->add_generation_prompt) &&
           refer_to_members(variables, t->special_tokens, NULL) && refer_to_members(variables, c->kwargs, NULL);
}

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Ends text where the mark begins. If the template has trimmed the mark's space, it would have trimmed the message's too.
static int cut_at_mark(char *text, size_t *length)
{
    size_t mark = sizeof end_mark - 2; // without its space
    for (size_t at = *length >= mark ? *length - mark + 1 : 0; at-- > 0;) {
        if (memcmp(text + at, end_mark, mark)) continue;
        bool trimmed = text[at + mark] != ' ';
        while (trimmed && at > 0 && is_space(text[at - 1])) at--;
        text[*length = at] = '\0';
        return 0;
    }
    return -1;
}

int chat_template_render(const struct chat_template *t, const struct chat_conversation *c, time_t now, char **text, size_t *length,
                         char *error, size_t error_size)
{
    *text = NULL;
    if (!t->jinja) return fail(error, error_size, "%s", t->broken);
    int result = -1;
    cJSON *variables = cJSON_CreateObject();
    if (!variables || !add_variables(variables, t, c)) fail(error, error_size, "out of memory");
    else result = jinja_render(t->jinja, variables, &jinja_default_limits, now, text, length, error, error_size);
    cJSON_Delete(variables);
    if (result == JINJA_RAISED) return CHAT_TEMPLATE_RAISED;
    if (result || !c->continue_final_message || !cut_at_mark(*text, length)) return result;
    free(*text);
    *text = NULL;
    return fail(error, error_size, "the final message, which was to be continued, is not in the template's text");
}
