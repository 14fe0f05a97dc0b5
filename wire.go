package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// timeouts holds the limits of waits, and the intervals of background work.
type timeouts struct {
	jsonBody       time.Duration // for a JSON body
	engineRead     time.Duration // for one read of the engine
	clientWrite    time.Duration // for one write to a client
	uploadStall    time.Duration // for the next bytes of an uploaded image
	statsFrame     time.Duration // for the next frame of the engine's statistics
	statsIdle      time.Duration // that a feed of statistics outlasts its latest request
	settle         time.Duration // for settling one service in a round, before a create, or after a failed one
	settleInterval time.Duration // between rounds of settling; the first delays the start by this at most
}

// forever is the limit of a request that has none.
const forever = math.MaxInt64 * time.Nanosecond

// noteChange adds the service's id and the operation to the log line of a request.
func noteChange(w http.ResponseWriter, id, op string) {
	if logged, ok := w.(*responseWriter); ok {
		logged.id, logged.op = id, op
	}
}

// readJSON decodes the body of a request after readBody.
func readJSON(r *http.Request, v any) error {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	return decodeJSON(text, v)
}

// decodeJSON decodes one JSON value. An unknown field or a null is an error. Its errors are for the client.
func decodeJSON(text []byte, v any) error {
	if !utf8.Valid(text) { // encoding/json would replace invalid bytes
		return badRequest("malformed JSON: it is not UTF-8")
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(v)
	wrongType, isWrongType := errors.AsType[*json.UnmarshalTypeError](err)
	switch {
	case isType[*apiError](err):
		return err
	case isWrongType:
		return badRequest("%s: a JSON %s is not allowed here", cmp.Or(wrongType.Field, "the body"), wrongType.Value)
	case err == io.EOF:
		return badRequest("the body is empty")
	case err != nil:
		return badRequest("malformed JSON: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := decoder.Token(); err != io.EOF {
		return badRequest("malformed JSON: more than one value")
	}
	var plain any
	if err := json.Unmarshal(text, &plain); err != nil {
		return err
	}
	if field, found := findNull(plain); found {
		return badRequest("%s: a JSON null is not allowed here", cmp.Or(field, "the body"))
	}
	return nil
}

// findNull returns the path of the first null in a decoded JSON value. encoding/json decodes a null as if the
// field were absent, so that a limit of null would be no limit.
func findNull(v any) (field string, found bool) {
	switch v := v.(type) {
	case nil:
		return "", true
	case []any:
		for _, element := range v {
			if field, found := findNull(element); found {
				return field, true
			}
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			if field, found := findNull(v[name]); found {
				return strings.TrimSuffix(name+"."+field, "."), true
			}
		}
	}
	return "", false
}

// encodeJSON returns v, which must marshal, as one line. It does not escape <, > and &, since that
// makes each of them six times as long.
func encodeJSON(v any) []byte {
	var line bytes.Buffer
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false)
	encoder.Encode(v)
	return line.Bytes()
}

// writeJSON answers with v, which must marshal.
func writeJSON(w http.ResponseWriter, status int, v any) {
	writeBytes(w, status, encodeJSON(v))
}

// writeBytes answers with JSON text. It ignores an error of Write: the client has disconnected.
func writeBytes(w http.ResponseWriter, status int, text []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	w.Write(text)
}

// responseWriter records status and size for the log, and sets a deadline for each write.
type responseWriter struct {
	http.ResponseWriter
	ctl     *http.ResponseController
	status  int // 0 until the header is written
	written int64
	wait    time.Duration // for one write
	id, op  string        // see noteChange
}

func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader remembers the status for the log.
func (w *responseWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Write sets a new deadline each time: a stream may last for ever, but a client that stops reading is
// disconnected.
func (w *responseWriter) Write(p []byte) (int, error) {
	w.ctl.SetWriteDeadline(time.Now().Add(w.wait))
	w.status = cmp.Or(w.status, http.StatusOK)
	n, err := w.ResponseWriter.Write(p)
	w.written += int64(n)
	if w.Header().Get("Content-Length") == "" { // a stream
		err = cmp.Or(err, w.ctl.Flush())
	}
	if err != nil {
		err = errors.New("cannot write to the client") // describe must not take it for the engine's
	}
	return n, err
}
