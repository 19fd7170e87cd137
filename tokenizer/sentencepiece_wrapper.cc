#include "tokenizer/sentencepiece_wrapper.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>

struct spm {
    sentencepiece::SentencePieceProcessor processor;
    int32_t size;        // the model's own pieces
    bool joins_unknown;  // it has no byte fallback: the processor has 256 byte pieces behind its own
};

// SentencePiece makes a run of unknown characters one piece by copying the run for each: quadratic, 30 s for 1 MB. With
// byte fallback it does not. So a model without it is loaded with byte pieces added, and spm_encode turns each run of
// those into one <unk>: the same ids in linear time. What is appended are two fields of ModelProto (repeated fields and
// messages merge): pieces {piece: "<0x00>" type: BYTE}, ... and trainer_spec {byte_fallback: true}.
static std::string with_byte_pieces(const char *model, size_t n)
{
    std::string proto(model, n);
    for (int byte = 0; byte < 256; byte++) {
        char piece[16];
        proto.append(piece, snprintf(piece, sizeof piece, "\x0A\x0A\x0A\x06<0x%02X>\x18\x06", byte));
    }
    return proto.append("\x12\x03\x98\x02\x01");
}

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
        auto &processor = spm->processor;
        auto status = processor.LoadFromSerializedProto({model, n});
        if (!status.ok()) return status;
        spm->size = processor.GetPieceSize();
        spm->joins_unknown = true;
        for (int id = 0; id < spm->size && spm->joins_unknown; id++) spm->joins_unknown = !processor.IsByte(id);
        if (spm->joins_unknown) status = processor.LoadFromSerializedProto(with_byte_pieces(model, n));
        if (status.ok()) *out = spm.release();
        return status;
    });
}

void spm_destroy(struct spm *spm) { delete spm; }

int32_t spm_size(const struct spm *spm) { return spm->size; }
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

static void join_unknown(const struct spm *spm, std::vector<int> *ids)
{
    size_t n = 0;
    bool in_run = false;
    for (const int id : *ids) {
        const bool unknown = id >= spm->size;
        if (!(unknown && in_run)) (*ids)[n++] = unknown ? spm->processor.unk_id() : id;
        in_run = unknown;
    }
    ids->resize(n);
}

int spm_encode(const struct spm *spm, const char *text, size_t length, int32_t **ids, size_t *n, char *error,
               size_t error_size)
{
    *ids = nullptr;
    *n = 0;
    return guard(error, error_size, [&]() -> sentencepiece::util::Status {
        std::vector<int> found;
        auto status = spm->processor.Encode({text, length}, &found);
        if (spm->joins_unknown) join_unknown(spm, &found);
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
