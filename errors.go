package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/client"
)

// A kind of error tells a program what it can do next. Kinds and their status are part of the API;
// descriptions are for people, and may change.
type kind struct {
	status int
	name   string
}

// All kinds that there are.
var (
	kindBadRequest       = kind{400, "bad_request"}        // ask for something else
	kindArchiveRefused   = kind{400, "archive_refused"}    // mend the archive of bind_contents, or of the image
	kindUnauthorized     = kind{401, "unauthorized"}       // find the right core key
	kindNoSuchPath       = kind{404, "no_such_path"}       // look it up in the API's document
	kindNoSuchService    = kind{404, "no_such_service"}    // it is gone, or has yet to be created
	kindNoSuchImage      = kind{404, "no_such_image"}      // import it, or give the registry's credentials
	kindMethodNotAllowed = kind{405, "method_not_allowed"} // the header Allow lists those that are
	kindIDTaken          = kind{409, "id_taken"}           // compare with the service or container that has it
	kindDirectoryInUse   = kind{409, "directory_in_use"}   // somebody has to look at the data there
	kindRenamedByHand    = kind{409, "renamed_by_hand"}    // somebody has to give the container its name back
	kindNotRunning       = kind{409, "not_running"}        // start it
	kindNoStdin          = kind{409, "no_stdin"}           // create it with open_stdin
	kindNoTTY            = kind{409, "no_tty"}             // create it with tty
	kindEngineConflict   = kind{409, "engine_conflict"}    // such as a paused container: its words say which
	kindImageInUse       = kind{409, "image_in_use"}       // delete or change the services that use it
	kindPortTaken        = kind{409, "port_taken"}         // free the host's port, or choose another one
	kindTooLarge         = kind{413, "too_large"}          // send less, or no body where none belongs
	kindInternal         = kind{500, "internal"}           // somebody has to read the daemon's log
	kindBindRootMoved    = kind{503, "bind_root_moved"}    // somebody has to restart the daemon, or mount its disk
	kindEngineFailed     = kind{502, "engine_failed"}      // the engine refused, or could not: its words say why
	kindDownloadFailed   = kind{502, "download_failed"}    // mend the URL of bind_contents, or its server
	kindUnavailable      = kind{503, "unavailable"}        // ask again in a second: no engine, or the daemon ends
	kindHTTPVersion      = kind{505, "http_version_not_supported"}
	kindDiskFull         = kind{507, "disk_full"} // somebody has to make room on the machine
	kindTimeout          = kind{504, "timeout"}   // look what there is, or ask again
)

// apiError is an error that the client reads as it stands.
type apiError struct {
	kind        kind
	description string
}

func (e *apiError) Error() string { return e.description }

// isA reports whether err is, or wraps, an error of type E.
func isType[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// failure returns an error of the API, whose text goes to the client as it is. A string among args may be
// somebody else's, of any length: it is cut.
func newAPIError(k kind, format string, args ...any) error {
	for i, arg := range args {
		if text, ok := arg.(string); ok {
			args[i] = truncate(text)
		}
	}
	return &apiError{k, fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) error {
	return newAPIError(kindBadRequest, format, args...)
}

func noSuchService(id string) error {
	return newAPIError(kindNoSuchService, "no service %q", id)
}

func noSuchImage(name string) error {
	return newAPIError(kindNoSuchImage, "no image %q", name)
}

func idTaken(id string) error {
	return newAPIError(kindIDTaken, "there is a container %q already", id)
}

const internalText = "internal error; the daemon's log has the details"

var (
	errNoSuchPath = newAPIError(kindNoSuchPath, "no such path")
	errUnreadable = newAPIError(kindEngineFailed, "the engine's answer cannot be read")
	errBusy       = newAPIError(kindTimeout, "another operation on this service is still under way")
)

// goPrefix is what Go's packages put ahead of their errors.
var goPrefix = regexp.MustCompile(`\b(archive/tar|gzip|flate|net/http|http|tls|x509): `)

// plain returns the innermost cause of an error from Go's packages: those around it name addresses of
// the host, and its name servers.
func rootCause(err error) string {
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

// truncate cuts third-party text to maxQuote bytes.
func truncate(text string) string {
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
	message = truncate(message)
	switch {
	case isTooLong:
		return kindTooLarge, fmt.Sprintf("the body has more than %d bytes", tooLong.Limit)
	case errors.Is(err, context.DeadlineExceeded):
		return kindTimeout, "this was not done in time; the engine may still be at it"
	case errors.Is(err, context.Canceled):
		return kindUnavailable, "the request was given up"
	case client.IsErrConnectionFailed(err), isType[*net.OpError](err), errors.Is(err, io.EOF):
		return kindUnavailable, "the engine cannot be reached"
	case errors.Is(err, errBadRecord):
		return kindInternal, internalText
	case isType[*json.SyntaxError](err), isType[*json.UnmarshalTypeError](err), errors.Is(err, io.ErrUnexpectedEOF):
		return describe(errUnreadable)
	case errdefs.IsConflict(err):
		return kindEngineConflict, message
	case strings.Contains(message, "engine: client version "): // "… is too old": it is another one now
		return kindUnavailable, message
	case errdefs.IsInvalidArgument(err):
		return kindBadRequest, message
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return kindDiskFull, "the disk is full"
	case isType[syscall.Errno](err): // the file system's; all other errors are the engine's
		return kindInternal, internalText
	}
	return kindEngineFailed, message
}
