package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/client"
)

const (
	maxJSON     = 1 << 20     // bytes of a JSON body
	uploadStall = time.Minute // longest pause in an upload
	maxQuote    = 512         // bytes of somebody else's text in an error
	lingerTime  = time.Second // for discarding what a client still sends after its answer
	forever     = math.MaxInt64 * time.Nanosecond
)

// A route is one line of the API. All paths need the core key, so access is no column.
type route struct {
	pattern string         // as for [http.ServeMux]; each stands under /v1 as well
	success int            // status, if handle writes none
	body    int64          // most bytes of the request's body
	limit   time.Duration  // forever: until the client leaves, or the daemon
	finish  bool           // runs to its end, or limit, even if the client leaves
	query   *regexp.Regexp // matches each parameter that its query may have, as name=value; nil: none
	handle  func(*server, http.ResponseWriter, *http.Request) error
}

// routes is the whole API.
func (s *server) routes() []route {
	change := s.stopTimeout + s.waits.read
	return []route{
		{"POST /service", 201, maxJSON, s.createTimeout, false, nil, (*server).createService},
		{"GET /service", 200, 0, s.waits.read, false, nil, (*server).listServices},
		{"GET /service/{id}", 200, 0, s.waits.read, false, nil, (*server).inspectService},
		{"DELETE /service/{id}", 204, 0, s.createTimeout, true, nil, (*server).deleteService},
		{"POST /service/{id}/ctl", 204, maxJSON, change, true, nil, (*server).controlService},
		{"GET /service/{id}/stats", 200, 0, forever, false, statsParameter, (*server).serviceStats},
		{"GET /service/{id}/logs", 200, 0, forever, false, logsParameter, (*server).serviceLogs},
		{"POST /service/{id}/stdin", 204, math.MaxInt64, forever, false, nil, (*server).serviceStdin},
		{"POST /service/{id}/tty", 204, maxJSON, s.waits.read, false, nil, (*server).resizeTTY},
		{"PATCH /service/{id}/env", 204, maxJSON, change, true, nil, (*server).setServiceEnv},
		{"POST /docker/image", 201, s.maxImageBytes, forever, false, nil,
			func(s *server, w http.ResponseWriter, r *http.Request) error { return s.images.importImage(w, r) }},
		{"GET /health", 204, 0, s.waits.read, false, nil, (*server).health},
	}
}

// server answers the core's requests. All its fields but met are set once, by newServer.
type server struct {
	config
	key      coreKey
	engine   *engine
	binds    *bindRoot
	images   *images
	log      *slog.Logger
	fetcher  *fetcher
	locks    serviceLocks // by service id
	stdin    serviceLocks // by container id
	stats    statsFeeds
	refusals refusals
	met      atomic.Bool // an engine was met that has no services which know the bind root by another path
	mux      *http.ServeMux
	life     context.Context // ends when changes under way must end
	serving  context.Context // ends when the daemon starts to shut down: streams end with it
}

// newServer registers each route twice, bare and under /v1, and each path once more for all other methods:
// net/http's own 405 never comes where there is a pattern for every path, as "/" is one.
func newServer(life, serving context.Context, cfg config, key coreKey, e *engine, b *bindRoot,
	log *slog.Logger) *server {
	s := &server{config: cfg, key: key, engine: e, binds: b, log: log, life: life, serving: serving,
		fetcher: newFetcher(cfg.fetchAllow), locks: newServiceLocks(), stdin: newServiceLocks(),
		stats: statsFeeds{byID: map[string]*statsFeed{}}, mux: http.NewServeMux(),
		images: newImages(life, cfg, e, b.root, b.path, log)}
	methods := map[string][]string{}
	for _, rt := range s.routes() {
		method, pattern, _ := strings.Cut(rt.pattern, " ")
		for _, prefix := range []string{"", "/v1"} {
			s.mux.HandleFunc(method+" "+prefix+pattern, func(w http.ResponseWriter, r *http.Request) {
				if err := s.answer(rt, w.(*response), r); err != nil {
					s.fail(w, r, err)
				}
			})
			methods[prefix+pattern] = append(methods[prefix+pattern], method)
		}
	}
	for pattern, allowed := range methods {
		slices.Sort(allowed)
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			s.fail(w, r, failure(wrongMethod, "%s is not allowed here", r.Method))
		})
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.fail(w, r, errNoSuchPath) })
	return s
}

// ServeHTTP admits a request, and logs it. Nothing but the key check sees one without the key.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w := &response{ResponseWriter: rw, ctl: http.NewResponseController(rw), wait: s.waits.write}
	defer s.conclude(w, r, r.Body, start)
	if len(r.TransferEncoding) > 0 {
		// net/http drops a Content-Length beside it: RFC 9112, section 6.1, wants the end of the connection then.
		w.Header().Set("Connection", "close")
	}
	if !s.key.authorizes(r) {
		w.Header().Set("Connection", "close")
		s.fail(w, r, failure(unauthorized, "Accessing this daemon requires core authorization."))
		return
	}
	r.Context().Value(knownKey{}).(func())()
	if p := r.URL.EscapedPath(); path.Clean("/"+p) != p {
		s.fail(w, r, errNoSuchPath) // the mux would redirect, or answer in plain text
	} else {
		s.mux.ServeHTTP(w, r)
	}
}

// conclude logs a request whose handler has returned or broken off, and bounds what net/http still does for
// it. body is the request's, as it came.
func (s *server) conclude(w *response, r *http.Request, body io.ReadCloser, start time.Time) {
	// net/http sends what it still has of the answer, and waits for a client that does not read.
	w.ctl.SetWriteDeadline(time.Now().Add(w.wait))
	// It reads the rest of the body, up to 256 KiB, and waits for a client that does not send. Where there is no
	// body it reads already what follows: a deadline that passes there ends the context of all that follows.
	if body != http.NoBody {
		w.ctl.SetReadDeadline(time.Now().Add(lingerTime))
	}
	if w.status == http.StatusUnauthorized {
		s.refusals.add(s.log, r.RemoteAddr+": no core key, or another")
		return
	}
	s.log.Info("request", "method", r.Method, "route", r.Pattern, "id", r.PathValue("id"), "status", w.status,
		"bytes", w.written, "duration", time.Since(start).Round(time.Microsecond), "remote", r.RemoteAddr)
	if w.status >= 400 {
		// Of a longer body it leaves the rest unread, and closes the connection. The kernel resets that then, and
		// the answer is lost to a client that is still sending: so what it sends is read here, for lingerTime.
		w.ctl.Flush()
		io.Copy(io.Discard, body)
	}
}

// answer is what every admitted request goes through.
func (s *server) answer(rt route, w *response, r *http.Request) error {
	if id := r.PathValue("id"); strings.Contains(rt.pattern, "{id}") && !serviceID.MatchString(id) {
		return noSuchService(id)
	}
	err := rt.checkQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	if rt.body == 0 && r.ContentLength != 0 { // net/http would wait for it before the answer
		return failure(tooLarge, "this request has no body")
	}
	ctx := r.Context()
	if rt.finish {
		ctx = s.life
	}
	ctx, cancel := context.WithTimeout(ctx, rt.limit)
	defer cancel()
	if rt.limit == forever {
		defer context.AfterFunc(s.serving, cancel)()
	}
	r.Body = http.MaxBytesReader(w.ResponseWriter, r.Body, rt.body)
	if !s.engine.known.Load() || !s.met.Load() {
		err = s.meetEngine(ctx)
	}
	if err == nil {
		err = rt.handle(s, w, r.WithContext(ctx))
	}
	if err == nil && w.status == 0 {
		w.WriteHeader(rt.success)
	}
	return err
}

// checkQuery returns an error for a parameter that the route does not have, that has another value
// than it may, or that is there twice: no value is like "true,true".
func (rt route) checkQuery(text string) error {
	query, err := url.ParseQuery(text)
	if err != nil {
		return badRequest("the query cannot be read")
	}
	for name, values := range query {
		parameter := name + "=" + strings.Join(values, ",")
		if rt.query == nil || !rt.query.MatchString(parameter) {
			return badRequest("%.100q: no such parameter, or not one of its values", parameter)
		}
	}
	return nil
}

// A kind of error tells a program what it can do next. Kinds and their status are part of the API;
// descriptions are for people, and may change.
type kind struct {
	status int
	name   string
}

// All kinds that there are.
var (
	invalid        = kind{400, "bad_request"}        // ask for something else
	refusedArchive = kind{400, "archive_refused"}    // mend the archive of bind_contents, or of the image
	unauthorized   = kind{401, "unauthorized"}       // find the right core key
	unknownPath    = kind{404, "no_such_path"}       // look it up in the API's document
	unknownService = kind{404, "no_such_service"}    // it is gone, or has yet to be created
	unknownImage   = kind{404, "no_such_image"}      // import it, or give the registry's credentials
	wrongMethod    = kind{405, "method_not_allowed"} // the header Allow lists those that are
	takenID        = kind{409, "id_taken"}           // compare with the service or container that has it
	fullDirectory  = kind{409, "directory_in_use"}   // somebody has to look at the data there
	renamed        = kind{409, "renamed_by_hand"}    // somebody has to give the container its name back
	notRunning     = kind{409, "not_running"}        // start it
	withoutStdin   = kind{409, "no_stdin"}           // create it with open_stdin
	withoutTTY     = kind{409, "no_tty"}             // create it with tty
	engineConflict = kind{409, "engine_conflict"}    // such as a paused container: its words say which
	tooLarge       = kind{413, "too_large"}          // send less, or no body where none belongs
	internal       = kind{500, "internal"}           // somebody has to read the daemon's log
	engineFailed   = kind{502, "engine_failed"}      // the engine refused, or could not: its words say why
	downloadFailed = kind{502, "download_failed"}    // mend the URL of bind_contents, or its server
	unavailable    = kind{503, "unavailable"}        // ask again in a second: no engine, or the daemon ends
	timedOut       = kind{504, "timeout"}            // look what there is, or ask again
	diskFull       = kind{507, "disk_full"}          // somebody has to make room on the machine
)

// apiError is an error that the client reads as it stands.
type apiError struct {
	kind        kind
	description string
}

func (e *apiError) Error() string { return e.description }

// isA reports whether err is, or wraps, an error of type E.
func isA[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// failure returns an error of the API, whose text goes to the client as it is. A string among args may be
// somebody else's, of any length: it is cut.
func failure(k kind, format string, args ...any) error {
	for i, arg := range args {
		if text, ok := arg.(string); ok {
			args[i] = quote(text)
		}
	}
	return &apiError{k, fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) error {
	return failure(invalid, format, args...)
}

func noSuchService(id string) error {
	return failure(unknownService, "no service %q", id)
}

func noSuchImage(name string) error {
	return failure(unknownImage, "no image %q", name)
}

var (
	errNoSuchPath = failure(unknownPath, "no such path")
	errUnreadable = failure(engineFailed, "the engine's answer cannot be read")
	errUnderWay   = failure(timedOut, "another operation on this service is still under way")
)

// fail answers with an error. Where an answer has begun it logs the error and breaks the
// connection off, so that nobody takes what there is for all. It is the only writer of errors.
func (s *server) fail(rw http.ResponseWriter, r *http.Request, err error) {
	kind, description := describe(err)
	if kind == unavailable {
		rw.Header().Set("Retry-After", "1")
		if !errors.Is(err, context.Canceled) { // of a client that has left
			s.engine.known.Store(false) // by then it may be another
		}
	}
	if kind == internal {
		s.log.Error("request failed", "route", r.Pattern, "id", r.PathValue("id"), "err", err)
	}
	if rw.(*response).status != 0 {
		if !errors.Is(err, context.Canceled) { // by the client, or at the daemon's end
			s.log.Warn("answer broken off", "route", r.Pattern, "id", r.PathValue("id"), "err", description)
		}
		panic(http.ErrAbortHandler)
	}
	writeJSON(rw, kind.status, map[string]any{"error": struct {
		Code        int    `json:"code"`
		Reason      string `json:"reason"`
		Description string `json:"description"`
		Kind        string `json:"kind"`
	}{kind.status, http.StatusText(kind.status), description, kind.name}})
}

// goPrefix is what Go's packages put ahead of their errors.
var goPrefix = regexp.MustCompile(`\b(archive/tar|gzip|flate|net/http|http|tls|x509): `)

// plain returns the innermost cause of an error from Go's packages: those around it name addresses of
// the host, and its name servers.
func plain(err error) string {
	if lookup, ok := errors.AsType[*net.DNSError](err); ok && lookup.IsNotFound {
		return "no such host"
	} else if ok {
		return "the host's name cannot be looked up"
	}
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return goPrefix.ReplaceAllString(err.Error(), "")
}

// quote cuts a text of somebody else's to 512 bytes.
func quote(text string) string {
	if len(text) <= maxQuote {
		return text
	}
	return strings.ToValidUTF8(text[:maxQuote], "") + "…"
}

// describe returns what a client may know of err: all that the engine says, which can name paths of
// the host, and of what fails here no more than the kind.
func describe(err error) (k kind, description string) {
	if api, ok := errors.AsType[*apiError](err); ok {
		return api.kind, api.description
	}
	tooLong, isTooLong := errors.AsType[*http.MaxBytesError](err)
	// The SDK puts words of its own around the engine's, in these three places.
	message := strings.ReplaceAll(err.Error(), "Error response from daemon", "engine")
	message, _, _ = strings.Cut(goPrefix.ReplaceAllString(message, ""), " for API route and version ")
	message = quote(message)
	switch {
	case isTooLong:
		return tooLarge, fmt.Sprintf("the body has more than %d bytes", tooLong.Limit)
	case errors.Is(err, context.DeadlineExceeded):
		return timedOut, "this was not done in time; the engine may still be at it"
	case errors.Is(err, context.Canceled):
		return unavailable, "the request was given up"
	case client.IsErrConnectionFailed(err), isA[*net.OpError](err), errors.Is(err, io.EOF):
		return unavailable, "the engine cannot be reached"
	case isA[*json.SyntaxError](err), isA[*json.UnmarshalTypeError](err), errors.Is(err, io.ErrUnexpectedEOF):
		return describe(errUnreadable)
	case errdefs.IsConflict(err):
		return engineConflict, message
	case strings.Contains(message, "engine: client version "): // "… is too old": it is another one now
		return unavailable, message
	case errdefs.IsInvalidArgument(err):
		return invalid, message
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return diskFull, "the disk is full"
	case isA[syscall.Errno](err), errors.Is(err, errMoved):
		// The file system's. All other errors are the engine's.
		return internal, "internal error; the daemon's log has the details"
	}
	return engineFailed, message
}

// readJSON reads the whole body as one JSON value without unknown fields into v.
func (s *server) readJSON(rw http.ResponseWriter, r *http.Request, v any) error {
	ctl := http.NewResponseController(rw)
	ctl.SetReadDeadline(time.Now().Add(s.waits.json))
	body, err := io.ReadAll(r.Body)
	// Left in place it would end the request's context while the handler works.
	ctl.SetReadDeadline(time.Time{})
	if err != nil && !isA[*http.MaxBytesError](err) {
		err = badRequest("the body is incomplete or came too slowly")
	}
	if err != nil {
		return err
	}
	return decodeJSON(body, v)
}

// decodeJSON decodes one JSON value without unknown fields. Its errors are for the client.
func decodeJSON(text []byte, v any) error {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(v)
	wrongType, isWrongType := errors.AsType[*json.UnmarshalTypeError](err)
	switch {
	case isA[*apiError](err):
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
	if field, problem := checkMembers(json.NewDecoder(bytes.NewReader(text))); problem != "" {
		return badRequest("%s: %s", cmp.Or(field, "the body"), problem)
	}
	return nil
}

// checkMembers reads a well-formed JSON value, and returns what is wrong with it though package json
// would decode it without an error, and in which field: a null, which decodes as if the field were not
// there, so that a null limit would be no limit; or a second field of one name, of which the last counts.
func checkMembers(d *json.Decoder) (field, problem string) {
	token, _ := d.Token()
	if token == nil {
		return "", "a JSON null is not allowed here"
	}
	if _, isDelim := token.(json.Delim); !isDelim {
		return "", ""
	}
	names := map[string]bool{}
	for d.More() {
		name := ""
		if token == json.Delim('{') {
			key, _ := d.Token()
			if name = key.(string); names[name] {
				return name, "is there twice"
			}
			names[name] = true
		}
		if field, problem := checkMembers(d); problem != "" {
			return strings.Trim(name+"."+field, "."), problem
		}
	}
	d.Token() // its end
	return "", ""
}

// writeJSON answers with a value that has a JSON form.
func writeJSON(w http.ResponseWriter, status int, v any) {
	text, _ := json.Marshal(v)
	writeBytes(w, status, append(text, '\n'))
}

// passOn answers with the engine's JSON, unless there is an error.
func passOn(w http.ResponseWriter, text []byte, err error) error {
	if err == nil {
		writeBytes(w, http.StatusOK, text)
	}
	return err
}

// writeBytes answers with JSON text. If that fails the client is gone.
func writeBytes(w http.ResponseWriter, status int, text []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	w.Write(text)
}

// response counts for the log, and bounds the time that a client may take to read.
type response struct {
	http.ResponseWriter
	ctl     *http.ResponseController
	status  int // 0 until the answer has begun
	written int64
	wait    time.Duration // for the client to read
}

func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader remembers the status for the log.
func (w *response) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Write gives the client w.wait for each piece, so that a stream may last for ever,
// and a client that reads nothing may not.
func (w *response) Write(p []byte) (int, error) {
	w.ctl.SetWriteDeadline(time.Now().Add(w.wait))
	w.status = cmp.Or(w.status, http.StatusOK)
	n, err := w.ResponseWriter.Write(p)
	w.written += int64(n)
	if w.Header().Get("Content-Length") == "" { // a stream: each write is sent at once
		err = cmp.Or(err, w.ctl.Flush())
	}
	if err != nil {
		err = errors.New("the client does not read") // no error of the engine's connection
	}
	return n, err
}

// health answers GET /health: whether services can be worked on.
func (s *server) health(_ http.ResponseWriter, r *http.Request) error {
	return s.meetEngine(r.Context())
}
