#include "tokenizer/sentencepiece_wrapper.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>

struct spm {
    sentencepiece::SentencePieceProcessor processor;
};

// Runs f, which returns SentencePiece's status; failures and exceptions become a message and -1.
template <typename F> static int guard(char *error, size_t error_size, F f)
{
    try {
        const sentencepiece::util::Status status = f();
        if (status.ok()) return 0;
        snprintf(error, error_size, "%s", status.error_message());
    } catch (const std::bad_alloc &) {
        snprintf(error, error_size, "out of memory");
    } catch (const std::exception &e) {
        snprintf(error, error_size, "%s", e.what());
    } catch (...) {
        snprintf(error, error_size, "unknown exception");
    }
    return -1;
}

int spm_create(struct spm **out, const char *model, size_t n, char *error, size_t error_size)
{
    *out = nullptr;
    return guard(error, error_size, [&] {
        auto spm = std::make_unique<struct spm>();
        auto status = spm->processor.LoadFromSerializedProto({model, n});
        if (status.ok()) *out = spm.release();
        return status;
    });
}

void spm_destroy(struct spm *spm) { delete spm; }

int32_t spm_size(const struct spm *spm) { return spm->processor.GetPieceSize(); }
int32_t spm_bos_id(const struct spm *spm) { return spm->processor.bos_id(); }
int32_t spm_eos_id(const struct spm *spm) { return spm->processor.eos_id(); }

enum spm_type spm_type(const struct spm *spm, int32_t id)
{
    const auto &p = spm->processor;
    return p.IsByte(id) ? SPM_BYTE : p.IsControl(id) ? SPM_CONTROL : p.IsUnknown(id) ? SPM_UNKNOWN : SPM_TEXT;
}

const char *spm_piece(const struct spm *spm, int32_t id, size_t *length)
{
    const std::string &piece = spm->processor.IdToPiece(id);
    *length = piece.size();
    return piece.data();
}

int32_t spm_id(const struct spm *spm, const char *piece)
{
    const int id = spm->processor.PieceToId(piece); // the id of <unk> when there is none
    return spm->processor.IdToPiece(id) == piece ? id : -1;
}

int spm_encode(const struct spm *spm, const char *text, size_t length, int32_t **ids, size_t *n, char *error,
               size_t error_size)
{
    *ids = nullptr;
    *n = 0;
    return guard(error, error_size, [&]() -> sentencepiece::util::Status {
        std::vector<int> found;
        auto status = spm->processor.Encode({text, length}, &found);
        if (!status.ok() || found.empty()) return status;
        *ids = static_cast<int32_t *>(malloc(found.size() * sizeof **ids));
        if (!*ids) throw std::bad_alloc();
        *n = found.size();
        std::copy(found.begin(), found.end(), *ids);
        return status;
    });
}

int64_t spm_decode(const struct spm *spm, const int32_t *ids, size_t n, char *out, size_t out_size)
{
    int64_t length = -1;
    guard(out, out_size, [&] {
        std::string text;
        auto status = spm->processor.Decode(std::vector<int>(ids, ids + n), &text);
        if (status.ok()) {
            snprintf(out, out_size, "%s", text.c_str());
            length = static_cast<int64_t>(text.size());
        }
        return status;
    });
    return length;
}
