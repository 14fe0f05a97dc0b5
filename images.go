package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
)

// importName is the repository of imported images. Each has a tag of its own: the
// engine prunes an image without a name, and one name for all would leave the last one.
const importName = "duxcore/import"

const (
	imageChunk    = 256 << 10 // bytes of an upload that are passed on at a time
	maxPadding    = 1 << 20   // bytes behind an archive's end mark; tar fills up to 10 KiB
	maxInspection = 1 << 20   // bytes of what the engine says of an image
)

// importPrefix is what the names begin with under which this daemon's imports are made. They are
// its journal for images: what has one while no request is at work on it gets removed, be it of a
// daemon that died, or what an engine keeps of an archive that it could not unpack.
func (s *server) importPrefix() string {
	sum := sha256.Sum256([]byte(s.binds.path))
	return fmt.Sprintf("%s:new-%x-", importName, sum[:6])
}

// importImage answers POST /docker/image when the image has its tag.
func (s *server) importImage(w http.ResponseWriter, r *http.Request) error {
	entry := s.importPrefix() + rand.Text()
	unlock, err := s.locks.lock(s.life, entry)
	if err != nil {
		return err
	}
	defer unlock()
	id, err := s.passUpload(w, r, entry)
	finish, cancel := context.WithTimeout(s.life, s.waits.read)
	defer cancel()
	hex, ok := strings.CutPrefix(id, "sha256:")
	if err == nil && (!ok || len(hex) != 64) {
		err = failure(engineFailed, "the engine did not say which image it imported")
	}
	if err == nil {
		err = s.engine.api().ImageTag(finish, id, importName+":"+hex[:12]) // the commit
	}
	if dropErr := s.dropImport(finish, entry); dropErr != nil {
		s.log.Warn("an import is still to be finished or undone", "image", entry, "err", dropErr)
	}
	if err == nil {
		writeJSON(w, http.StatusCreated, map[string]string{"image_id": id})
	}
	return err
}

var (
	errSlowUpload = badRequest("the body came too slowly")
	errSlowImport = failure(timedOut, "the engine did not take the image in time")
	errShortTake  = failure(engineFailed, "the engine did not take the whole image")
)

// passUpload has the engine make an image of a request's body, which passes through as it comes.
// The engine takes an empty or a cut-off archive for an empty or smaller image: so this follows the
// archive on its way, and breaks the engine's request off before its end unless it was whole. Of
// all that can fail here, at either end or by its time, the first is the error.
func (s *server) passUpload(w http.ResponseWriter, r *http.Request, entry string) (id string, err error) {
	// Not the request's context: once the upload is complete, the image gets its tag.
	ctx, cancel := context.WithCancelCause(s.life)
	defer cancel(nil)
	giveUp := func(after time.Duration, err error) *time.Timer {
		return time.AfterFunc(after, func() { cancel(err) })
	}
	out, in := io.Pipe()
	// net/http ends no request before its body's Read has returned.
	defer context.AfterFunc(ctx, func() { in.CloseWithError(context.Cause(ctx)) })()
	made := make(chan string)
	var taken atomic.Bool // all of the upload, by the engine
	upload := readerFunc(func(p []byte) (int, error) {
		n, err := out.Read(p)
		if err == io.EOF {
			taken.Store(true)
		}
		return n, err
	})
	go func() { // ends with ctx; passUpload waits for it
		// No pipe: net/http would close it when the engine answers, and the error would be that.
		id, err := s.makeImage(ctx, entry, bufio.NewReaderSize(upload, imageChunk))
		if err == nil && !taken.Load() {
			err = errShortTake
		}
		if err != nil {
			cancel(err)
			// A read that is under way ends soon, but not one of a client that still sends: net/http
			// could not read the rest of its chunks, and the answer would be lost.
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(lingerTime))
		}
		out.CloseWithError(errShortTake)
		made <- id
	}()
	client := readerFunc(func(p []byte) (int, error) {
		defer giveUp(uploadStall, errSlowUpload).Stop()
		return r.Body.Read(p)
	})
	engine := writerFunc(func(p []byte) (int, error) {
		defer giveUp(uploadStall, errSlowImport).Stop()
		return in.Write(p)
	})
	if err := followTar(engine, client); err != nil {
		cancel(err)
	} else {
		in.Close() // the engine sees the end
	}
	defer giveUp(s.createTimeout, errSlowImport).Stop()
	id = <-made
	if err = context.Cause(ctx); err != nil { // more may follow, or the deadline may have ended its context
		w.Header().Set("Connection", "close")
	}
	return id, err
}

// readerFunc and writerFunc are functions as an io.Reader and an io.Writer.
type (
	readerFunc func([]byte) (int, error)
	writerFunc func([]byte) (int, error)
)

func (f readerFunc) Read(p []byte) (int, error)  { return f(p) }
func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// makeImage has the engine make an image of a tar stream, under the name of its journal entry.
func (s *server) makeImage(ctx context.Context, entry string, archive io.Reader) (id string, err error) {
	source := image.ImportSource{Source: archive, SourceName: "-"}
	_, tag, _ := strings.Cut(entry, ":")
	answer, err := s.engine.api().ImageImport(ctx, source, importName, image.ImportOptions{Tag: tag})
	if err != nil {
		return "", err
	}
	defer answer.Close()
	return lastStatus(answer)
}

// dropImport removes the name of an import, and the image with it unless that has its tag.
func (s *server) dropImport(finish context.Context, entry string) error {
	_, err := s.engine.api().ImageRemove(finish, entry, image.RemoveOptions{})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// removeUnfinished removes what imports have left whose daemon was killed.
func (s *server) removeUnfinished(ctx context.Context) error {
	entries, err := s.unfinishedImports()
	if err != nil {
		return err
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	for _, entry := range entries {
		unlock, err := s.locks.lock(done, entry)
		if err != nil {
			continue // under way
		}
		err = s.dropImport(ctx, entry)
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// unfinishedImports returns the names of this daemon's imports, those under way among them.
func (s *server) unfinishedImports() (entries []string, err error) {
	ctx, cancel := context.WithTimeout(s.life, s.waits.read)
	defer cancel()
	options := image.ListOptions{Filters: filters.NewArgs(filters.Arg("reference", importName))}
	list, err := s.engine.api().ImageList(ctx, options)
	for _, found := range list {
		for _, name := range found.RepoTags {
			if strings.HasPrefix(name, s.importPrefix()) {
				entries = append(entries, name)
			}
		}
	}
	return entries, err
}

// compressed lists how gzip, bzip2, xz, zstd and lz4 streams begin. The engine decompresses them,
// even one that is a tar archive as well, whose first entry has such a name.
var compressed = []string{
	"\x1f\x8b", "BZh", "\xfd7zXZ", "\x28\xb5\x2f\xfd", "\x04\x22\x4d\x18", "\x02\x21\x4c\x18"}

// skippable is how a frame for users of zstd and lz4 begins, behind its first byte.
const skippable = "\x2a\x4d\x18"

// followTar copies r to w, and returns nil if that was one whole tar archive, with an entry at
// least and with its end mark, and else an error for the client. The last byte that it has looked at
// stays behind until the next: so w never has the whole header of an entry that is refused.
func followTar(w io.Writer, r io.Reader) error {
	in, out := bufio.NewReaderSize(r, imageChunk), bufio.NewWriterSize(w, imageChunk)
	start, _ := in.Peek(8) // what is shorter has no entry
	isCompressed := func(magic string) bool { return strings.HasPrefix(string(start), magic) }
	if slices.ContainsFunc(compressed, isCompressed) || len(start) > 4 && string(start[1:4]) == skippable {
		return failure(refusedArchive, "the body is compressed: it must be a plain tar archive")
	}
	stream := &limitedReader{r: io.TeeReader(in, out), left: math.MaxInt64}
	archive := tar.NewReader(stream)
	entries := 0
	header, err := archive.Next()
	for ; err == nil; header, err = archive.Next() {
		if err := checkEntry(header); err != nil {
			return failure(refusedArchive, "entry %q: %v", header.Name, err)
		}
		if header.Typeflag != tar.TypeXGlobalHeader {
			entries++
		}
	}
	if err == io.EOF && entries == 0 {
		return failure(refusedArchive, "the body is not a tar archive: it has no entry")
	}
	if err == io.EOF {
		padding := 0
		err = stream.drain(writerFunc(func(p []byte) (int, error) {
			// The engine keeps all of it, and other programs may find another archive there.
			if padding += len(p); padding > maxPadding || len(bytes.Trim(p, "\x00")) > 0 {
				return 0, errors.New("something stands behind its end mark")
			}
			return len(p), nil
		}))
	}
	if err == nil {
		err = out.Flush()
	}
	if err == nil || isA[*http.MaxBytesError](err) || isA[*apiError](err) {
		return err
	}
	return failure(refusedArchive, "the body is not a whole tar archive: %s", plain(err))
}

// checkEntry returns an error for an entry that an image cannot have, or in which not all programs see
// the same. Of a few bytes of a sparse file the engine writes as many zeros as they say.
func checkEntry(h *tar.Header) error {
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse") {
			return errors.New("it is a sparse file")
		}
		if h.Typeflag == tar.TypeXGlobalHeader && record != "comment" { // git's is one
			return errors.New("a global header changes all entries for some programs, for others none")
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return nil
	case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo,
		tar.TypeXGlobalHeader:
		if h.Size != 0 { // what follows would be its content, or the next entry
			return errors.New("only a file can have a size")
		}
		return nil
	}
	return errors.New("it is not a file, directory, link, device or FIFO")
}

// ensureImage makes sure that the engine has the service's image, and pulls it if it does not.
// registryAuth is passed on to the engine as its X-Registry-Auth.
func (s *server) ensureImage(ctx context.Context, p serviceParams, registryAuth string) (string, error) {
	id, err := s.checkImage(ctx, p)
	if !errdefs.IsNotFound(err) {
		return id, err
	}
	if imageID.MatchString(p.Image) { // no registry knows it
		return "", noSuchImage(p.Image)
	}
	progress, err := s.engine.api().ImagePull(ctx, p.Image, image.PullOptions{RegistryAuth: registryAuth})
	if errdefs.IsNotFound(err) {
		_, text := describe(err)
		return "", failure(unknownImage, "cannot pull the image: %s", text)
	}
	if err != nil {
		return "", fmt.Errorf("cannot pull the image: %w", err)
	}
	defer progress.Close()
	if _, err := lastStatus(progress); err != nil {
		return "", err
	}
	id, err = s.checkImage(ctx, p)
	if errdefs.IsNotFound(err) { // a pull that said nothing of its failure
		return "", noSuchImage(p.Image)
	}
	return id, err
}

// checkImage returns a 400 if an image says what a service must not have: containers inherit it.
// Its labels come with each list of containers, and its working directory can be where params
// would be refused. What lies in it, links among it, is the engine's and the runtime's to confine.
func (s *server) checkImage(ctx context.Context, p serviceParams) (string, error) {
	call := url.URL{Path: "/images/" + p.Image + "/json"}
	answer, err := s.engine.send(ctx, http.MethodGet, call, http.Header{}, http.StatusOK)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxInspection+1))
	if len(text) > maxInspection {
		return "", badRequest("image: its configuration has more than %d bytes", maxInspection)
	}
	var found struct {
		ID     string
		Config struct{ WorkingDir string }
	}
	if err = cmp.Or(err, json.Unmarshal(text, &found)); err != nil {
		return "", err
	}
	if p.WorkingDir == "" && within(path.Clean("/"+found.Config.WorkingDir), "/proc") {
		return "", badRequest("image: its working directory is under /proc")
	}
	return found.ID, nil
}

// lastStatus reads the engine's progress messages to their end and returns the last
// one's status. A failure comes as a message too, in an answer that began with 200.
func lastStatus(progress io.Reader) (status string, err error) {
	decoder := json.NewDecoder(progress)
	for {
		var message struct {
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		if err := decoder.Decode(&message); err == io.EOF {
			return status, nil
		} else if err != nil {
			return "", err
		}
		if message.Error != "" {
			return "", errors.New("engine: " + message.Error)
		}
		status = message.Status
	}
}
