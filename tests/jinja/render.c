/* Renders templates for compare.py: a JSON object per line on stdin, {"template": .., "variables": {..}, "now": seconds}, and one
 * per line on stdout, {"text": ..}, {"raised": ..} or {"error": ..}.
 */
#include "tokenizer/jinja.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void render(const cJSON *request, cJSON *answer)
{
    char error[2048], *text = NULL;
    size_t length;
    struct jinja_template *t;
    const char *source = cJSON_GetStringValue(cJSON_GetObjectItem(request, "template"));
    const cJSON *variables = cJSON_GetObjectItem(request, "variables"), *now = cJSON_GetObjectItem(request, "now");
    if (jinja_create(&t, source, strlen(source), error, sizeof error)) {
        cJSON_AddStringToObject(answer, "error", error);
        return;
    }
    int result = jinja_render(t, variables, &jinja_default_limits, now ? (time_t)now->valuedouble : 0, &text, &length, error,
                              sizeof error);
    cJSON_AddStringToObject(answer, result == 0 ? "text" : result == JINJA_RAISED ? "raised" : "error", result == 0 ? text : error);
    if (result == 0) free(text);
    jinja_destroy(t);
}

int main(void)
{
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, stdin) > 0) {
        cJSON *request = cJSON_Parse(line), *answer = cJSON_CreateObject();
        if (request) render(request, answer);
        char *text = cJSON_PrintUnformatted(answer);
        puts(text);
        fflush(stdout);
        cJSON_free(text);
        cJSON_Delete(answer);
        cJSON_Delete(request);
    }
    free(line);
    return 0;
}
