package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/client"
)

// maxQuote is how many bytes of third-party text an error may hold.
const maxQuote = 512

// A kind of error tells a client what it can do next. Kinds and their status are part of the API;
// descriptions are for people, and may change.
type kind struct {
	status int
	name   string
}

// The comment on each kind says what a client can do.
var (
	kindBadRequest       = kind{400, "bad_request"}        // correct the request
	kindArchiveRefused   = kind{400, "archive_refused"}    // fix the archive of bind_contents, or of the image
	kindUnauthorized     = kind{401, "unauthorized"}       // use the right core key
	kindNoSuchPath       = kind{404, "no_such_path"}       // see docs/API.md
	kindNoSuchService    = kind{404, "no_such_service"}    // create it; it may have been deleted
	kindNoSuchImage      = kind{404, "no_such_image"}      // import it, or send the registry's credentials
	kindMethodNotAllowed = kind{405, "method_not_allowed"} // use a method from the Allow header
	kindIDTaken          = kind{409, "id_taken"}           // look at the service or container that has it
	kindDirectoryInUse   = kind{409, "directory_in_use"}   // an administrator has to look at the data
	kindRenamedByHand    = kind{409, "renamed_by_hand"}    // an administrator has to rename it back
	kindNotRunning       = kind{409, "not_running"}        // start it
	kindNoStdin          = kind{409, "no_stdin"}           // set open_stdin with a PUT, and restart it
	kindNoTTY            = kind{409, "no_tty"}             // set tty with a PUT, and restart it
	kindEngineConflict   = kind{409, "engine_conflict"}    // see the engine's description: perhaps it is paused
	kindImageInUse       = kind{409, "image_in_use"}       // delete or change the services that use it
	kindPortTaken        = kind{409, "port_taken"}         // free the host's port, or choose another
	kindTooLarge         = kind{413, "too_large"}          // send less, or no body if the route has none
	kindInternal         = kind{500, "internal"}           // an administrator has to read the daemon's log
	kindBindRootMoved    = kind{503, "bind_root_moved"}    // an administrator mounts the disk, or restarts us
	kindEngineFailed     = kind{502, "engine_failed"}      // see the engine's description
	kindDownloadFailed   = kind{502, "download_failed"}    // fix the URL of bind_contents, or its server
	kindUnavailable      = kind{503, "unavailable"}        // retry in a second: see the description
	kindHTTPVersion      = kind{505, "http_version_not_supported"}
	kindDiskFull         = kind{507, "disk_full"} // an administrator has to free space on the machine
	kindTimeout          = kind{504, "timeout"}   // the outcome is unknown: look at the service, or retry
)

// apiError is an error whose description goes to the client unchanged.
type apiError struct {
	kind        kind
	description string
}

func (e *apiError) Error() string { return e.description }

// isType reports whether err is, or wraps, an error of type E.
func isType[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// newAPIError returns an apiError. It truncates the strings among args, which may be third-party text of any
// length.
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
	errNoSuchPath  = newAPIError(kindNoSuchPath, "no such path")
	errUnreachable = newAPIError(kindUnavailable, "the engine cannot be reached")
	errUnreadable  = newAPIError(kindEngineFailed, "the engine's answer cannot be read")
	errBusy        = newAPIError(kindTimeout, "another operation on this service is still under way")
)

// goPrefix matches the package names that the standard library puts at the start of its errors.
var goPrefix = regexp.MustCompile(`\b(archive/tar|gzip|flate|net/http|http|tls|x509): `)

// rootCause returns the text of the innermost error: the errors that wrap it, such as [net.OpError], name
// addresses of the host and its name servers.
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

// describe returns what the client is told about err: the description of an apiError; an engine's error, of
// maxQuote bytes at most, although it may name paths of the host; and of any other error only the kind.
func describe(err error) (k kind, description string) {
	if api, ok := errors.AsType[*apiError](err); ok {
		return api.kind, api.description
	}
	tooLong, isTooLong := errors.AsType[*http.MaxBytesError](err)
	// Without what the SDK adds: a prefix, package names, and the API's route and version at the end.
	message := strings.ReplaceAll(err.Error(), "Error response from daemon", "engine")
	message, _, _ = strings.Cut(goPrefix.ReplaceAllString(message, ""), " for API route and version ")
	message = truncate(message)
	switch {
	case isTooLong:
		return kindTooLarge, fmt.Sprintf("the body has more than %d bytes", tooLong.Limit)
	case errors.Is(err, context.DeadlineExceeded):
		return kindTimeout, "the operation did not finish in time; the engine may still be working on it"
	case errors.Is(err, context.Canceled):
		return kindUnavailable, "the request was canceled"
	case client.IsErrConnectionFailed(err), isType[*net.OpError](err), errors.Is(err, io.EOF):
		return describe(errUnreachable)
	case errors.Is(err, errBadRecord):
		return kindInternal, internalText
	case isType[*json.SyntaxError](err), isType[*json.UnmarshalTypeError](err),
		errors.Is(err, io.ErrUnexpectedEOF):
		return describe(errUnreadable)
	case errdefs.IsConflict(err):
		return kindEngineConflict, message
	case strings.Contains(message, "engine: client version "): // "… is too old": the engine was replaced
		return kindUnavailable, message
	case errdefs.IsInvalidArgument(err):
		return kindBadRequest, message
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return kindDiskFull, "the disk is full"
	case strings.Contains(message, syscall.ENOSPC.Error()), strings.Contains(message, syscall.EDQUOT.Error()):
		return kindDiskFull, message // the engine's disk
	case isType[syscall.Errno](err), isType[*fs.PathError](err), isType[*os.LinkError](err):
		// An error of the file system, or of an os.Root that a path would leave. All others are the engine's.
		return kindInternal, internalText
	}
	return kindEngineFailed, message
}

// errBadRecord is wrapped by the error for a record that cannot be decoded. Only an administrator can fix it.
var errBadRecord = errors.New("the record is damaged")
