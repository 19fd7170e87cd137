// The same of a chat's body, through a template that looks at everything that a request brings.
#include "server/chat_request.h"
#include "tests/fuzz/request_fuzz.h"

#include <stdio.h>
#include <unistd.h>

static const char source[] =
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% if m.name %}{{ m.name|upper }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments|tojson }}){% for k, v in "
    "c.function.arguments|items %}{{ k ~ '=' ~ v }},{% endfor %}{% endfor %}{{ m.reasoning_content|default('')|trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ extra }}{% if extra is mapping %}{{ extra|dictsort }}{% endif %}";

static void setup_template(void)
{
    char dir[] = "/tmp/gptd-fuzz-chat.XXXXXX", path[64], error[256];
    struct chat_template *t;
    assert(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    FILE *file = fopen(path, "wb");
    assert(file && fputs(source, file) >= 0);
    fclose(file);
    int failed = chat_template_create(&t, dir, error, sizeof error);
    assert(!failed);
    unlink(path);
    rmdir(dir);
    limits.chat_template = t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (limits.plan == NULL) setup(), setup_template();
    check_body(chat_request_parse, data, size);
    return 0;
}
