package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
)

// importName is the repository of imported images. Each has its own tag: docker image prune removes
// untagged images, and a shared tag would untag the previous one.
const importName = "duxcore/import"

const (
	maxImageConfig = 64 << 10                         // bytes of an image's configuration, as JSON
	maxVolumes     = 32                               // of an image
	listTries      = 10                               // of a list of images, see repository
	containerdRoot = "/var/lib/containerd"            // of a containerd that the engine did not start
	oTmpfile       = 0o20000000 | syscall.O_DIRECTORY // package syscall lacks it
)

// images imports images, and pulls those of services.
type images struct {
	engine        *engine
	binds         *bindRoot // uploads are written to unnamed files in it
	log           *slog.Logger
	ctx           context.Context // done when the daemon no longer waits for operations in progress
	shutdown      context.Context // ends, with the uploads, when the daemon starts to shut down
	createTimeout time.Duration   // for one import by the engine
	timeouts      timeouts
	// tempPrefix is the prefix of the temporary tags of this daemon's imports. They are a journal: an image
	// with such a tag and no import in progress is removed. It was left by a killed daemon, or by an engine
	// that keeps images it failed to unpack (containerd's store).
	tempPrefix string
	held       sync.RWMutex // read-locked while a PUT writes a record with another image; see hold
	inProgress sync.Map     // temporary tags of imports in progress; none is used twice
	notSynced  sync.Once    // logs that imports are not synced
}

// tempPrefix returns images.tempPrefix for the daemon whose bind root is at path.
func tempPrefix(path string) string {
	sum := sha256.Sum256([]byte(path))
	return fmt.Sprintf("%s:new-%x-", importName, sum[:6])
}

// listImages answers GET /docker/image with the engine's entries of imported images.
func (x *images) listImages(w http.ResponseWriter, r *http.Request) error {
	list, err := x.imported(r.Context())
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, list)
	return nil
}

// removeImage answers DELETE /docker/image/{image}. It is a 404 for an image that was not imported.
func (x *images) removeImage(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("image")
	noteChange(w, truncate(id), "remove_image")
	list, err := x.imported(r.Context())
	if err != nil {
		return err
	}
	known := slices.ContainsFunc(list, func(found image.Summary) bool { return found.ID == id })
	if known {
		if err := x.removeUnused(r.Context(), id); err != nil {
			return err
		}
	}
	// Without a sync, a power cut could bring the image back. An image that is not known may have been removed
	// by an earlier request, whose sync failed: so this comes before the 404, too.
	if err := x.syncEngine(r.Context()); err != nil {
		return err
	}
	if !known {
		return noSuchImage(id)
	}
	return nil
}

// removeUnused removes an import's tag, and with it the image, unless something uses the image.
func (x *images) removeUnused(ctx context.Context, id string) error {
	x.held.Lock()
	defer x.held.Unlock()
	used, err := x.binds.usesImage(id)
	if err != nil {
		return err
	}
	if used {
		return newAPIError(kindImageInUse, "a service uses the image %q", id)
	}
	err = x.dropImport(ctx, importTag(id))
	if errdefs.IsConflict(err) { // a container uses it
		_, message := describe(err)
		return newAPIError(kindImageInUse, "%s", message)
	}
	return err
}

// hold makes sure that the image of a spec is still there, and keeps removeImage waiting until release is
// called.
func (x *images) hold(ctx context.Context, spec serviceSpec) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, x.timeouts.engineRead)
	defer cancel()
	x.held.RLock()
	_, err = x.engine.api().ImageInspect(ctx, spec.ImageID)
	if err == nil {
		return x.held.RUnlock, nil
	}
	x.held.RUnlock()
	if errdefs.IsNotFound(err) {
		err = noSuchImage(spec.Params.Image)
	}
	return nil, err
}

// importTag returns the tag of an import: the first digits of its image's id.
func importTag(imageID string) string { return importName + ":" + imageID[len("sha256:"):][:12] }

// importImage answers POST /docker/image. The engine gets nothing before the whole archive was received and
// checked. From then on the import finishes even if the client disconnects.
func (x *images) importImage(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, "", "import_image")
	archive, err := x.receive(w, r)
	if err != nil {
		return err
	}
	defer archive.Close()
	id, err := x.makeImage(archive)
	if err != nil {
		return err
	}
	noteChange(w, id, "import_image")
	writeJSON(w, http.StatusCreated, map[string]string{"image_id": id})
	return nil
}

var (
	errSlowUpload   = badRequest("the body came too slowly")
	errBrokenUpload = badRequest("the body is incomplete")
	errShuttingDown = newAPIError(kindUnavailable, "the daemon is shutting down")
)

// receive writes a request's body to an unnamed file while checkTar reads it, and returns the file. The
// caller closes it, which frees its space, as the death of this process does. File systems without O_TMPFILE
// (see open(2)), such as NFS, cannot hold the bind root of a daemon that imports images.
func (x *images) receive(w http.ResponseWriter, r *http.Request) (*os.File, error) {
	file, err := x.binds.root.OpenFile(".", os.O_RDWR|oTmpfile, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make a file for an upload: %w", err)
	}
	ctl := http.NewResponseController(w)
	defer context.AfterFunc(x.shutdown, func() { ctl.SetReadDeadline(time.Now()) })()
	body := readerFunc(func(p []byte) (int, error) {
		ctl.SetReadDeadline(time.Now().Add(x.timeouts.uploadStall))
		if x.shutdown.Err() != nil { // asked now, since this deadline may have replaced that of AfterFunc
			return 0, errShuttingDown
		}
		n, err := r.Body.Read(p)
		switch { // not by r.Context: net/http cancels it at every error of a read (connReader)
		case x.shutdown.Err() != nil:
			return n, errShuttingDown
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, errSlowUpload
		case err != nil && err != io.EOF && !isType[*http.MaxBytesError](err):
			return n, errBrokenUpload
		}
		return n, err
	})
	err = checkTar(io.TeeReader(body, file))
	// net/http reads on in the background from the body's end (connReader). A deadline that was set after that
	// would cancel the contexts of this request and of later ones on the connection.
	ctl.SetReadDeadline(time.Time{})
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// makeImage has the engine make an image of an archive, under its own tag, and returns the image's id once a
// power cut cannot damage it. After an error it removes the image; if the engine fails then too, an image
// with its own tag may be left.
func (x *images) makeImage(archive *os.File) (id string, err error) {
	ctx, cancel := context.WithTimeout(x.ctx, x.createTimeout) // not the request's: see importImage
	defer cancel()
	tempTag := x.tempPrefix + rand.Text()
	x.inProgress.Store(tempTag, true)
	defer x.inProgress.Delete(tempTag) // after cleanUp: deferred calls run last to first
	defer x.cleanUp(tempTag)
	id, err = x.importArchive(ctx, archive, tempTag)
	if err != nil {
		return "", err
	}
	if !imageID.MatchString(id) || !strings.HasPrefix(id, "sha256:") {
		return "", newAPIError(kindEngineFailed, "the engine did not say which image it imported")
	}
	// The image first, or a power cut could leave a damaged one that has its own tag.
	if err := x.syncEngine(ctx); err != nil {
		return "", err
	}
	tag := importTag(id)
	err = x.engine.api().ImageTag(ctx, id, tag)
	if err == nil {
		err = x.syncEngine(ctx)
	}
	if err != nil {
		x.cleanUp(tag)
		return "", err
	}
	return id, nil
}

// cleanUp removes a tag of an import that has ended, and the image if it has no other.
func (x *images) cleanUp(tag string) {
	ctx, cancel := context.WithTimeout(x.ctx, x.timeouts.engineRead)
	defer cancel()
	if err := x.dropImport(ctx, tag); err != nil {
		x.log.Warn("cannot remove a tag of an import", "image", tag, "err", err)
	}
}

// importArchive has the engine import an archive under a temporary tag.
func (x *images) importArchive(ctx context.Context, archive *os.File, tempTag string) (id string, err error) {
	info, err := archive.Stat()
	if err != nil {
		return "", err
	}
	// net/http copies 32 KiB at a time, unless the source is an io.WriterTo, as a bufio.Reader is.
	source := bufio.NewReaderSize(io.NewSectionReader(archive, 0, info.Size()), imageChunk)
	_, tag, _ := strings.Cut(tempTag, ":")
	options := image.ImportOptions{Tag: tag}
	answer, err := x.engine.api().ImageImport(ctx,
		image.ImportSource{Source: source, SourceName: "-"}, importName, options)
	if err == nil {
		defer answer.Close()
		id, err = lastStatus(answer)
	}
	if err == nil {
		return id, nil
	}
	if reason := cannotUnpack.FindStringSubmatch(err.Error()); reason != nil {
		_, words := describe(err)
		return "", newAPIError(kindArchiveRefused,
			"the engine cannot unpack the archive (%s): %s", reason[1], words)
	}
	return "", err
}

// cannotUnpack matches the end of the engine's errors for archives that it can never unpack; the words before
// it differ between engines 20.10 and 29, and 26 writes ": unknown" after those of containerd. An error that
// may not come again, such as for a full disk, is not among them.
var cannotUnpack = regexp.MustCompile(`(duplicates of file paths not supported|archive/tar: [^:]+|` +
	`no such file or directory|file exists|file name too long|not a directory|is a directory|` +
	`directory not empty|operation not permitted|too many levels of symbolic links|invalid argument|` +
	`argument list too long|numerical result out of range|device or resource busy|` +
	`cannot be mapped to a host ID|invalid (?:symlink|hardlink) .*)(?:: unknown)?\W*$`)

// dropImport removes a tag of an import, and the image if it has no other tag.
func (x *images) dropImport(ctx context.Context, tag string) error {
	_, err := x.engine.api().ImageRemove(ctx, tag, image.RemoveOptions{})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// removeUnfinished removes the temporary tags of this daemon's imports that are not in progress.
func (x *images) removeUnfinished(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, x.timeouts.engineRead)
	defer cancel()
	list, err := x.repository(ctx)
	if err != nil {
		return err
	}
	for _, found := range list {
		for _, tag := range found.RepoTags {
			// A tag is in inProgress before the engine can list it, so the import of one that is not has ended.
			if _, busy := x.inProgress.Load(tag); busy || !strings.HasPrefix(tag, x.tempPrefix) {
				continue
			}
			if err := x.dropImport(ctx, tag); err != nil {
				return err
			}
		}
	}
	return nil
}

// repository returns all images in the repository of imports, those with temporary tags included. With
// containerd's store the engine answers 404 if some image is removed while it makes the list (seen with 26.1
// and 28.5, in one of 20 and one of 100 lists): then repository asks again.
func (x *images) repository(ctx context.Context) (list []image.Summary, err error) {
	options := image.ListOptions{Filters: filters.NewArgs(filters.Arg("reference", importName))}
	for range listTries {
		list, err = x.engine.api().ImageList(ctx, options)
		if !errdefs.IsNotFound(err) {
			break
		}
	}
	return list, err
}

// imported returns the images of finished imports, those of other daemons on this engine included.
func (x *images) imported(ctx context.Context) ([]image.Summary, error) {
	list, err := x.repository(ctx)
	return slices.DeleteFunc(list, func(found image.Summary) bool {
		return !imageID.MatchString(found.ID) || !slices.Contains(found.RepoTags, importTag(found.ID))
	}), err
}

// syncEngine makes durable what the engine has written. The engine does not: after a power cut, an image can
// have files full of zeros (seen with 28.5). If the engine's directories cannot be opened here, such as those
// of an engine on another machine, it logs that once and returns nil.
func (x *images) syncEngine(ctx context.Context) error {
	info, err := x.engine.api().Info(ctx)
	if err != nil {
		return err
	}
	dirs := []string{info.DockerRootDir}
	if slices.Contains(info.DriverStatus, [2]string{"driver-type", "io.containerd.snapshotter.v1"}) {
		dirs = append(dirs, containerdRoot) // if missing, containerd's root is below the engine's
	}
	for _, path := range dirs {
		dir, err := x.openEngineDir(path)
		switch {
		case err == nil:
			err = syncFilesystem(dir)
			dir.Close()
			if err != nil {
				return err
			}
		case path == containerdRoot && errors.Is(err, fs.ErrNotExist): // it is below the engine's
		case errors.Is(err, errElsewhere), errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
			x.notSynced.Do(func() {
				x.log.Warn("imports are not synced: a power cut soon after one can damage the image", "err", err)
			})
		default: // for example, no descriptor is left
			return err
		}
	}
	return nil
}

var errElsewhere = errors.New("it may be on another machine")

// openEngineDir opens a directory of the engine if the engine runs on this machine.
func (x *images) openEngineDir(path string) (*os.File, error) {
	if host := x.engine.api().DaemonHost(); !strings.HasPrefix(host, "unix:") {
		return nil, fmt.Errorf("the engine is at %s: %w", host, errElsewhere)
	}
	return os.Open(path)
}

// ensure returns the spec of a service, whose image it checks, and pulls first if it is missing. registryAuth
// is passed on as X-Registry-Auth.
func (x *images) ensure(ctx context.Context, p serviceParams, registryAuth string) (serviceSpec, error) {
	spec, err := x.check(ctx, p)
	if errdefs.IsNotFound(err) && !imageID.MatchString(p.Image) { // no registry resolves a bare id
		if err := x.pull(ctx, p.Image, registryAuth); err != nil {
			return spec, err
		}
		spec, err = x.check(ctx, p)
	}
	if errdefs.IsNotFound(err) { // after a pull, too, if that has failed without an error
		err = noSuchImage(p.Image)
	}
	return spec, err
}

// pull has the engine pull an image.
func (x *images) pull(ctx context.Context, name, registryAuth string) error {
	progress, err := x.engine.api().ImagePull(ctx, name, image.PullOptions{RegistryAuth: registryAuth})
	if errdefs.IsNotFound(err) {
		_, text := describe(err)
		return newAPIError(kindNoSuchImage, "cannot pull the image: %s", text)
	}
	if err != nil {
		return fmt.Errorf("cannot pull the image: %w", err)
	}
	defer progress.Close()
	if _, err := lastStatus(progress); err != nil {
		return err
	}
	return x.syncEngine(ctx)
}

// check inspects the image of a service. It returns a 400 for a configuration that a container must not
// inherit: a large one, or one with many volumes, since every list of containers repeats them; or a working
// directory that serviceParams.check would refuse, unless the service has its own. Symbolic links inside the
// image are the runtime's concern.
func (x *images) check(ctx context.Context, p serviceParams) (serviceSpec, error) {
	var text bytes.Buffer
	found, err := x.engine.api().ImageInspect(ctx, p.Image, client.ImageInspectWithRawResponse(&text))
	if err != nil || found.Config == nil {
		return serviceSpec{Params: p, ImageID: found.ID}, err
	}
	var raw struct{ Config json.RawMessage }
	if err := json.Unmarshal(text.Bytes(), &raw); err != nil {
		return serviceSpec{}, err
	}
	switch {
	case len(raw.Config) > maxImageConfig:
		err = badRequest("image: its configuration has more than %d bytes", maxImageConfig)
	case len(found.Config.Volumes) > maxVolumes:
		err = badRequest("image: it has more than %d volumes", maxVolumes)
	case p.WorkingDir == "" && within(path.Clean("/"+found.Config.WorkingDir), "/proc"):
		err = badRequest("image: its working directory is under /proc")
	}
	return serviceSpec{p, found.ID, found.Config.User}, err
}

// lastStatus reads the engine's progress messages to the end and returns the status of the last. A failure is
// a message too, since the engine has answered 200 by then.
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
