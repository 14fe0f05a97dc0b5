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
	imageChunk     = 256 << 10 // bytes of an upload that are read, or passed to the engine, at a time
	maxImageConfig = 64 << 10  // bytes of an image's configuration, as JSON
	maxVolumes     = 32        // of an image
	uploadName     = ".upload"
	containerdRoot = "/var/lib/containerd"            // of a containerd that the engine does not run itself
	oTmpfile       = 0o20000000 | syscall.O_DIRECTORY // package syscall lacks it
)

// images imports images, and makes sure that the image of a service is present.
type images struct {
	engine        *engine
	binds         *bindRoot // uploads are written to unnamed files in it
	log           *slog.Logger
	ctx           context.Context // ends when what has begun must end
	createTimeout time.Duration   // for one import by the engine
	readTimeout   time.Duration   // for listing images, and for removing a temporary tag
	// tempPrefix is the prefix of the temporary tags of this daemon's imports. They are a journal: an image
	// with such a tag and no import in progress is removed. It was left by a killed daemon, or by an engine
	// that keeps images it failed to unpack (containerd's store).
	tempPrefix string
	inProgress sync.Map   // the temporary tags of imports in progress; none is ever used twice
	naming     sync.Mutex // held while uploadName exists
	notSynced  sync.Once  // logs that imports are not synced
}

// newImages returns the images of a daemon. It removes the upload file whose name a killed daemon has left.
func newImages(life context.Context, cfg config, e *engine, b *bindRoot, log *slog.Logger) *images {
	if err := b.root.Remove(uploadName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("cannot remove an upload that an earlier daemon has left", "err", err)
	}
	return &images{engine: e, binds: b, log: log, ctx: life, createTimeout: cfg.createTimeout,
		readTimeout: cfg.timeouts.engineRead, tempPrefix: tempPrefix(b.path)}
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

// removeImage answers DELETE /docker/image/{image}. An image that is not an import does not exist here.
func (x *images) removeImage(_ http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("image")
	list, err := x.imported(r.Context())
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(found image.Summary) bool { return found.ID == id }) {
		return noSuchImage(id)
	}
	used, err := x.binds.usesImage(id)
	if err != nil {
		return err
	}
	if used {
		return newAPIError(kindImageInUse, "a service uses the image %q", id)
	}
	err = x.dropImport(r.Context(), importTag(id))
	if errdefs.IsConflict(err) { // a container uses it
		_, message := describe(err)
		return newAPIError(kindImageInUse, "%s", message)
	}
	return err
}

// importTag returns the tag that an import gets: the beginning of its image's id.
func importTag(imageID string) string { return importName + ":" + imageID[len("sha256:"):][:12] }

// importImage answers POST /docker/image. The engine is asked only when the whole archive is here and has
// passed the check; from then on the import runs to its end even if the client disconnects.
func (x *images) importImage(w http.ResponseWriter, r *http.Request) error {
	archive, err := x.receive(w, r)
	if err != nil {
		w.Header().Set("Connection", "close") // a part of the body may be unread
		return err
	}
	defer archive.Close()
	id, err := x.makeImage(archive)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, map[string]string{"image_id": id})
	return nil
}

var (
	errSlowUpload   = badRequest("the body came too slowly")
	errBrokenUpload = badRequest("the body is incomplete")
)

// receive writes a request's body to an unnamed file while checkTar reads it. It returns the file of a
// whole archive that passed. The caller closes it, and with that it is gone, as it is with this process.
func (x *images) receive(w http.ResponseWriter, r *http.Request) (*os.File, error) {
	file, err := x.unnamedFile()
	if err != nil {
		return nil, fmt.Errorf("cannot make a file for an upload: %w", err)
	}
	ctl := http.NewResponseController(w)
	body := readerFunc(func(p []byte) (int, error) {
		ctl.SetReadDeadline(time.Now().Add(uploadStall))
		n, err := r.Body.Read(p)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, errSlowUpload
		case err != nil && err != io.EOF && !isType[*http.MaxBytesError](err):
			return n, errBrokenUpload
		}
		return n, err
	})
	err = checkTar(io.TeeReader(body, file))
	// Left in place it would end the request's context: net/http reads on once the body has ended.
	ctl.SetReadDeadline(time.Time{})
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// readerFunc adapts a function to io.Reader.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// unnamedFile returns a new file in the bind root that has no name: open(2), O_TMPFILE.
func (x *images) unnamedFile() (*os.File, error) {
	file, err := x.binds.root.OpenFile(".", os.O_RDWR|oTmpfile, 0o600)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return x.removedFile()
	}
	return file, err
}

// removedFile is unnamedFile for file systems without O_TMPFILE, such as NFS. If the daemon dies between the
// two steps, an empty file is left until its next start.
func (x *images) removedFile() (*os.File, error) {
	x.naming.Lock()
	defer x.naming.Unlock()
	file, err := x.binds.root.OpenFile(uploadName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := x.binds.root.Remove(uploadName); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// makeImage has the engine make an image of an archive, with a tag of its own, and returns its id when
// that will survive a power cut. Whatever fails, no image is left.
func (x *images) makeImage(archive *os.File) (id string, err error) {
	ctx, cancel := context.WithTimeout(x.ctx, x.createTimeout) // not the request's: see importImage
	defer cancel()
	tempTag := x.tempPrefix + rand.Text()
	x.inProgress.Store(tempTag, true)
	defer x.inProgress.Delete(tempTag)
	defer func() {
		ctx, cancel := context.WithTimeout(x.ctx, x.readTimeout)
		defer cancel()
		if err := x.dropImport(ctx, tempTag); err != nil {
			x.log.Warn("an import is still to be finished or undone", "image", tempTag, "err", err)
		}
	}()
	id, err = x.importArchive(ctx, archive, tempTag)
	if err != nil {
		return "", err
	}
	if !imageID.MatchString(id) || !strings.HasPrefix(id, "sha256:") {
		return "", newAPIError(kindEngineFailed, "the engine did not say which image it imported")
	}
	tag := importTag(id)
	if err := x.engine.api().ImageTag(ctx, id, tag); err != nil {
		return "", err
	}
	if err := x.syncEngine(ctx); err != nil {
		return "", errors.Join(err, x.dropImport(ctx, tag))
	}
	return id, nil
}

// importArchive has the engine import an archive under a temporary tag.
func (x *images) importArchive(ctx context.Context, archive *os.File, tempTag string) (id string, err error) {
	info, err := archive.Stat()
	if err != nil {
		return "", err
	}
	// net/http copies 32 KiB at a time, unless its source has a WriteTo as bufio.Reader does.
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
		return "", newAPIError(kindArchiveRefused, "the engine cannot unpack the archive (%s): %s", reason[1], words)
	}
	return "", err
}

// cannotUnpack matches the engine's errors for archives that it will never unpack, by how they end.
// Engines 20.10 to 29 put different words ahead of that, and none ahead of some. What can go better on
// another day, such as on a full disk, is not among these.
var cannotUnpack = regexp.MustCompile(`(duplicates of file paths not supported|archive/tar: [^:]+|` +
	`no such file or directory|file exists|file name too long|not a directory|is a directory|` +
	`directory not empty|operation not permitted|too many levels of symbolic links|invalid argument|` +
	`argument list too long|numerical result out of range|device or resource busy|` +
	`cannot be mapped to a host ID|invalid (?:symlink|hardlink) .*)\W*$`)

// dropImport removes a tag of an import, and the image with it unless it has another.
func (x *images) dropImport(ctx context.Context, tag string) error {
	_, err := x.engine.api().ImageRemove(ctx, tag, image.RemoveOptions{})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// removeUnfinished removes the temporary tags of this daemon's imports that are not in progress.
func (x *images) removeUnfinished(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, x.readTimeout)
	defer cancel()
	list, err := x.repository(ctx)
	if err != nil {
		return err
	}
	for _, found := range list {
		for _, tag := range found.RepoTags {
			// The list comes first: an import that is in it and not in progress has ended.
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

// repository returns the images in the repository of imports, with the temporary ones.
func (x *images) repository(ctx context.Context) ([]image.Summary, error) {
	options := image.ListOptions{Filters: filters.NewArgs(filters.Arg("reference", importName))}
	return x.engine.api().ImageList(ctx, options)
}

// imported returns the images of imports that have been answered, by any daemon on this engine.
func (x *images) imported(ctx context.Context) ([]image.Summary, error) {
	list, err := x.repository(ctx)
	return slices.DeleteFunc(list, func(found image.Summary) bool {
		return !imageID.MatchString(found.ID) || !slices.Contains(found.RepoTags, importTag(found.ID))
	}), err
}

// syncEngine makes durable what the engine has written. Engines do not: after a power cut an image can be
// there with files full of zeros (seen on 28.5). Where the engine's directories cannot be opened here, such
// as with an engine on another machine, it logs that once and returns nil.
func (x *images) syncEngine(ctx context.Context) error {
	info, err := x.engine.api().Info(ctx)
	if err != nil {
		return err
	}
	dirs := []string{info.DockerRootDir}
	if slices.Contains(info.DriverStatus, [2]string{"driver-type", "io.containerd.snapshotter.v1"}) {
		dirs = append(dirs, containerdRoot) // if it is missing, containerd's root is below the engine's
	}
	for _, path := range dirs {
		dir, err := x.openEngineDir(path)
		if err == nil {
			err = syncFilesystem(dir)
			dir.Close()
			if err != nil {
				return err
			}
		} else if path != containerdRoot || !errors.Is(err, fs.ErrNotExist) {
			x.notSynced.Do(func() {
				x.log.Warn("imports are not synced: a power cut soon after one can damage the image", "err", err)
			})
		}
	}
	return nil
}

// openEngineDir opens a directory of the engine if that runs on this machine.
func (x *images) openEngineDir(path string) (*os.File, error) {
	if host := x.engine.api().DaemonHost(); !strings.HasPrefix(host, "unix:") {
		return nil, fmt.Errorf("the engine at %s may be on another machine", host)
	}
	return os.Open(path)
}

// checkedImage is what a service needs to know of its image.
type checkedImage struct {
	id   string // sha256:…
	user string // USER of the image's configuration
}

// ensure makes sure that the engine has an image that a service may have, and pulls it if it is missing.
// workingDir is the service's own. registryAuth is passed on as X-Registry-Auth.
func (x *images) ensure(ctx context.Context, name, workingDir, registryAuth string) (checkedImage, error) {
	found, err := x.check(ctx, name, workingDir)
	if !errdefs.IsNotFound(err) {
		return found, err
	}
	if imageID.MatchString(name) { // no registry knows it
		return found, noSuchImage(name)
	}
	if err := x.pull(ctx, name, registryAuth); err != nil {
		return found, err
	}
	found, err = x.check(ctx, name, workingDir)
	if errdefs.IsNotFound(err) { // the pull failed without an error
		return found, noSuchImage(name)
	}
	return found, err
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
	_, err = lastStatus(progress)
	return err
}

// check inspects an image. It returns a 400 for one whose configuration a container would inherit and must
// not: a large one, since it comes with each list of containers, or a working directory that the parameters
// would be refused for. Symbolic links inside the image are the runtime's concern.
func (x *images) check(ctx context.Context, name, workingDir string) (checkedImage, error) {
	var text bytes.Buffer
	found, err := x.engine.api().ImageInspect(ctx, name, client.ImageInspectWithRawResponse(&text))
	if err != nil || found.Config == nil {
		return checkedImage{id: found.ID}, err
	}
	var raw struct{ Config json.RawMessage }
	if err := json.Unmarshal(text.Bytes(), &raw); err != nil {
		return checkedImage{}, err
	}
	switch {
	case len(raw.Config) > maxImageConfig:
		err = badRequest("image: its configuration has more than %d bytes", maxImageConfig)
	case len(found.Config.Volumes) > maxVolumes:
		err = badRequest("image: it has more than %d volumes", maxVolumes)
	case workingDir == "" && within(path.Clean("/"+found.Config.WorkingDir), "/proc"):
		err = badRequest("image: its working directory is under /proc")
	}
	return checkedImage{found.ID, found.Config.User}, err
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
